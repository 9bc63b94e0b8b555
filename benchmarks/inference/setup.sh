#!/usr/bin/env bash
# What compare.py runs beside ours: Python environments, llama.cpp built for this machine, checkpoints, and the peers' converted models.
#
#   benchmarks/inference/setup.sh [PEER …]     transformers, llama.cpp, onnxruntime, openvino; default: all these
#   benchmarks/inference/setup.sh llama.cpp-server   its server and llama-cpp-python's, for benchmarks/serving/compare.sh
#   ERNIE_INFERENCE_CACHE=FOLDER               where they go: about 18 GB; default: .cache/inference of this repository
#   PYTHON=python3.12                          the interpreter the environments are made of
#
# What is there is kept, so it can be run again after a failure. A peer that cannot be had is skipped: the reason is printed and put
# under FOLDER/skipped, where compare.py finds it. Needs a C++ compiler for llama.cpp. Takes half an hour on two cores.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=${ERNIE_INFERENCE_CACHE:-$here/../../.cache/inference}
mkdir -p "$cache"/{logs,skipped,models}
cache=$(cd "$cache" && pwd)
models=$cache/models
LLAMA_CPP_PYTHON=0.3.36
llama_cpp=$cache/llama.cpp/llama_cpp_python-$LLAMA_CPP_PYTHON/vendor/llama.cpp
LLAMA_CPP_PYTHON_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

# step NAME FUNCTION: runs it with its output in logs/NAME.log. (In the background, since `if FUNCTION` would turn `set -e` off inside.)
step() {
  echo "$1 …"
  (set -euo pipefail; "$2") > "$cache/logs/$1.log" 2>&1 &
  if wait $!; then return 0; fi
  reason="setup: $1 failed: $(grep -v '^[[:space:]]*$' "$cache/logs/$1.log" | tail -n 1 | cut -c 1-300)"
  echo "$reason (all of it: $cache/logs/$1.log)" >&2
  return 1
}

# needs PEER NAME FUNCTION …: the steps of a peer; the first that fails is why it is skipped.
needs() {
  local peer=$1
  shift
  rm -f "$cache/skipped/$peer"
  while [ $# -gt 0 ]; do
    if ! step "$1" "$2"; then
      echo "$reason" > "$cache/skipped/$peer"
      return 0
    fi
    shift 2
  done
}

# install ENVIRONMENT REQUIREMENTS: pip is not started again for a file that it has installed.
install() {
  local stamp="$cache/$1/installed-$(basename "$2")"
  cmp -s "$2" "$stamp" && return 0
  [ -x "$cache/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$cache/$1"
  "$cache/$1/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$2"
  cp "$2" "$stamp"
}

# convert FOLDER COMMAND …: runs `COMMAND … FOLDER.tmp` unless FOLDER is there, and gives it its name once it is complete.
convert() {
  local target=$1
  shift
  [ -e "$target" ] && return 0
  rm -rf "$target.tmp"
  "$@" "$target.tmp"
  mv "$target.tmp" "$target"
}

base() { install torch "$here/requirements-numpy.txt"; }
checkpoints() { "$cache/torch/bin/python" "$here/make_checkpoints.py" "$models"; }
torch() { install torch "$here/requirements-torch.txt"; }

# The sources that both builds of llama.cpp are made of.
source_llama_cpp() {
  local folder=$cache/llama.cpp
  install torch "$here/requirements-llama.cpp.txt"
  [ -d "$llama_cpp" ] && return 0
  mkdir -p "$folder"
  "$cache/torch/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest "$folder" \
    "llama-cpp-python==$LLAMA_CPP_PYTHON"
  echo "$LLAMA_CPP_PYTHON_SHA256  $folder/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz" | sha256sum --check
  # Elsewhere first: what was cut off is not taken for the whole.
  rm -rf "$folder/partial"
  mkdir "$folder/partial"
  tar -xf "$folder/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz" -C "$folder/partial"
  mv "$folder/partial/llama_cpp_python-$LLAMA_CPP_PYTHON" "$folder/"
  rmdir "$folder/partial"
}
build_llama_cpp() {
  local folder=$cache/llama.cpp
  [ -x "$folder/build/bin/llama-batched-bench" ] && return 0
  export PATH=$cache/torch/bin:$PATH
  cmake -G Ninja -S "$llama_cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF
  cmake --build "$folder/build" --target llama-bench llama-batched-bench
}
# Its own server, with the libraries that llama-cpp-python's uses too.
build_llama_cpp_server() {
  local folder=$cache/llama.cpp
  if [ ! -x "$folder/shared/bin/llama-server" ]; then
    export PATH=$cache/torch/bin:$PATH
    cmake -G Ninja -S "$llama_cpp" -B "$folder/shared" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=ON \
      -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_WEBUI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_OPENSSL=OFF
    cmake --build "$folder/shared" --target llama-server
  fi
  CMAKE_ARGS=-DLLAMA_BUILD=OFF "$cache/torch/bin/python" -m pip install --quiet --disable-pip-version-check --no-binary llama-cpp-python \
    "$folder/llama_cpp_python-$LLAMA_CPP_PYTHON.tar.gz[server]"
}
convert_llama_cpp() {
  local source=$llama_cpp python=$cache/torch/bin/python name
  for name in "$@"; do
    [ -e "$models/$name-q8_0.gguf" ] && continue
    "$python" "$source/convert_hf_to_gguf.py" "$models/$name" --outtype q8_0 --outfile "$models/$name-q8_0.tmp"
    # The converter takes the shared experts' width for intermediate_size / num_key_value_heads; here it is 2 experts of 512.
    [ "${name#D}" != "$name" ] || PYTHONPATH=$source/gguf-py "$python" -m gguf.scripts.gguf_set_metadata --force "$models/$name-q8_0.tmp" \
      ernie4_5-moe.expert_shared_feed_forward_length 1024
    mv "$models/$name-q8_0.tmp" "$models/$name-q8_0.gguf"
  done
}
convert_compared() { convert_llama_cpp D M; }
# With tokenizers that have a text for every token.
convert_served() {
  local name
  for name in D M; do "$cache/torch/bin/python" "$here/../serving/prepare.py" "$models/$name" "$models/$name-served"; done
  convert_llama_cpp D-served M-served
}

install_onnxruntime() { install torch "$here/requirements-onnxruntime.txt"; }
export_onnxruntime() {
  build() {
    "$cache/torch/bin/python" -m onnxruntime_genai.models.builder -m "$models/D" -p int8 -e cpu -c "$cache/onnxruntime" -o "$1" \
      --extra_options int8_accuracy_level=4 prune_lm_head=true
  }
  convert "$models/D-onnxruntime" build
}

install_openvino() { install openvino "$here/requirements-openvino.txt"; }
export_openvino() { convert "$models/D-openvino" "$cache/openvino/bin/python" "$here/openvino_export.py" "$models/D-llama"; }

# Nothing can be measured without these.
step base base
step checkpoints checkpoints
[ $# -gt 0 ] || set -- transformers llama.cpp onnxruntime openvino
for peer in "$@"; do
  case $peer in
    transformers) needs transformers torch torch ;;
    llama.cpp) needs llama.cpp torch torch llama.cpp-source source_llama_cpp llama.cpp-build build_llama_cpp llama.cpp-convert convert_compared ;;
    llama.cpp-server)
      needs llama.cpp-server torch torch llama.cpp-source source_llama_cpp llama.cpp-server-build build_llama_cpp_server \
        llama.cpp-server-convert convert_served ;;
    onnxruntime) needs onnxruntime torch torch onnxruntime-install install_onnxruntime onnxruntime-export export_onnxruntime ;;
    openvino) needs openvino openvino-install install_openvino openvino-export export_openvino ;;
    *) echo "$peer is none of transformers, llama.cpp, llama.cpp-server, onnxruntime, openvino" >&2; exit 2 ;;
  esac
done
