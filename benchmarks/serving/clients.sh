#!/usr/bin/env bash
# The clients that people have, against a server started here on a free port: OpenAI's for Python and for Node, and lm-evaluation-harness.
#
#   benchmarks/serving/clients.sh
#   ERNIE=target/release/ernie         the program; built if it is not given
#   ERNIE_CLIENTS=DIR                  where the clients are installed and kept: default .cache/clients of this repository
#   SKIP="node lm_eval"                what is left out
#
# Needs Python 3.10 or later and Node 20 or later, and their package registries the first time. Takes a minute once all is installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
clients=crates/ernie-serve/tests/clients
cache=${ERNIE_CLIENTS:-.cache/clients}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
log=$cache/server.log

if [ -z "${ERNIE:-}" ]; then
  cargo build --quiet --release --locked -p ernie-cli
  ERNIE=target/release/ernie
fi

skipped() { [[ " ${SKIP:-} " == *" $1 "* ]]; }

# environment NAME REQUIREMENTS: a virtual environment; pip is not started again for a file that it has installed.
environment() {
  cmp -s "$2" "$cache/$1/installed.txt" && return 0
  [ -x "$cache/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$cache/$1"
  "$cache/$1/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$2"
  cp "$2" "$cache/$1/installed.txt"
}

ERNIE_SERVE_REASONING_PARSER=none "$ERNIE" serve --port 0 --log-level warn > "$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT
for _ in $(seq 300); do
  base=$(grep -o 'http://[^ ]*/v1' "$log" || true)
  [ -n "$base" ] && break
  kill -0 "$server" || { cat "$log"; exit 1; }
  sleep 0.1
done
: "${base:?the server did not say where it listens}"

if ! skipped python; then
  environment openai "$clients/requirements-openai.txt"
  "$cache/openai/bin/python" "$clients/openai_client.py" "$base"
fi
if ! skipped node; then
  mkdir -p "$cache/node"
  cp "$clients/package.json" "$clients/openai_client.mjs" "$cache/node/"
  [ -d "$cache/node/node_modules/openai" ] || (cd "$cache/node" && npm install --silent --no-audit --no-fund --no-package-lock)
  (cd "$cache/node" && node openai_client.mjs "$base")
fi
if ! skipped lm_eval; then
  environment lm-eval "$clients/requirements-lm-eval.txt"
  (cd "$clients" && HF_HOME="$cache/huggingface" "$cache/lm-eval/bin/python" lm_eval_task.py "$base" ../../../../models/nano)
fi
