#!/usr/bin/env bash
# `ernie serve` beside llama-cpp-python's server and llama.cpp's own, on the same weights in 8 bits, one loaded at a time: load.py with all three.
# First `benchmarks/inference/setup.sh llama.cpp-server`.
#
#   benchmarks/serving/compare.sh [MODEL [load.py's options …]]     MODEL: D (ERNIE-4.5-0.3B's sizes, default) or M (a mixture of experts)
#   ERNIE=target/release/ernie                                      the program; built if it is not given
#   ERNIE_INFERENCE_CACHE=FOLDER                                    as setup.sh
#   SKIP="llama-cpp-python"                                         what is left out
#
# Each has two threads. Ours and llama.cpp's own take up to 16 requests at a time; llama-cpp-python's takes one.
set -euo pipefail
cd "$(dirname "$0")/../.."
cache=$(cd "${ERNIE_INFERENCE_CACHE:-.cache/inference}" && pwd)
model=${1:-D}
shift || true
logs=$(mktemp -d)
servers=()
trap 'kill "${servers[@]}" 2>/dev/null; wait 2>/dev/null || true; rm -rf "$logs"' EXIT

if [ -z "${ERNIE:-}" ]; then
  cargo build --quiet --release --locked -p ernie-cli
  ERNIE=target/release/ernie
fi

skipped() { [[ " ${SKIP:-} " == *" $1 "* ]]; }

# serve NAME PORT COMMAND …: starts a server and waits until it answers.
arguments=()
serve() {
  local name=$1 port=$2
  shift 2
  skipped "$name" && return 0
  "$@" > "$logs/$name.log" 2>&1 &
  servers+=($!)
  for _ in $(seq 600); do
    if curl --silent --fail --max-time 2 "http://127.0.0.1:$port/v1/models" > /dev/null; then
      arguments+=(--server "$name=http://127.0.0.1:$port/v1")
      return 0
    fi
    kill -0 "${servers[-1]}" || { tail -n 20 "$logs/$name.log" >&2; exit 1; }
    sleep 0.2
  done
  echo "$name does not answer" >&2
  exit 1
}

gguf=$cache/models/$model-served-q8_0.gguf
serve ernie 18081 "$ERNIE" --threads 2 serve --port 18081 --model "$cache/models/$model-served" --weights int8 --max-len 4096 --database sqlite::memory: \
  --log-level error
serve llama-cpp-python 18082 env LLAMA_CPP_LIB_PATH="$cache/llama.cpp/shared/bin" "$cache/torch/bin/python" -m llama_cpp.server --model "$gguf" --port 18082 \
  --n_ctx 4096 --n_threads 2 --n_threads_batch 2 --interrupt_requests False
serve llama-server 18083 "$cache/llama.cpp/shared/bin/llama-server" --model "$gguf" --port 18083 --ctx-size 65536 --parallel 16 --threads 2 \
  --threads-batch 2 --no-webui

python3 benchmarks/serving/load.py "${arguments[@]}" "$@"
