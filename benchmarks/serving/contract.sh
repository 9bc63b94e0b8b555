#!/usr/bin/env bash
# What /openapi.json says, held against what the server does: schemathesis makes up requests from the description, right ones and wrong ones, and checks
# that the answers are those that are described. Once with a key that may do all, once without keys.
#
#   benchmarks/serving/contract.sh
#   ERNIE=target/release/ernie         the program; built if it is not given
#   ERNIE_CONTRACT=DIR                 where schemathesis is installed and kept: default .cache/contract of this repository
#   EXAMPLES=20 SEED=7                 requests for each route and kind of test, and where random numbers begin
#
# Needs Python 3.10 or later, and its package registry the first time. Exit status 77: schemathesis cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
contract=$PWD/crates/ernie-serve/tests/contract
cache=${ERNIE_CONTRACT:-.cache/contract}
mkdir -p "$cache"
cache=$(cd "$cache" && pwd)

if [ -z "${ERNIE:-}" ]; then
  cargo build --quiet --release --locked -p ernie-cli
  ERNIE=target/release/ernie
fi
if ! cmp -s "$contract/requirements.txt" "$cache/venv/installed.txt"; then
  ([ -x "$cache/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$cache/venv") &&
    "$cache/venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$contract/requirements.txt" || exit 77
  cp "$contract/requirements.txt" "$cache/venv/installed.txt"
fi

server=
stop() { [ -z "$server" ] || { kill "$server" 2>/dev/null; wait "$server" 2>/dev/null; } || true; }
databases=$(mktemp -d)
trap 'stop; rm -rf "$databases"' EXIT

# serve NAME: a server with a database of its own; `base` is where it listens.
serve() {
  local log=$cache/$1.log
  stop
  "$ERNIE" serve --port 0 --log-level warn --model-name contract --database "sqlite:$databases/$1.db" > "$log" 2>&1 &
  server=$!
  for _ in $(seq 300); do
    base=$(grep -o 'http://[^ ]*/v1' "$log" || true)
    base=${base%/v1}
    [ -n "$base" ] && return
    kill -0 "$server" || { cat "$log"; exit 1; }
    sleep 0.1
  done
  echo "the server did not say where it listens" >&2
  exit 1
}

# check NAME OPTION…: left out is /v1/live, a stream without an end; the page's own tests look at it.
check() {
  local name=$1
  shift
  echo "== $name"
  # It leaves its notes where it runs.
  (cd "$cache" && PYTHONPATH=$contract PYTHONDONTWRITEBYTECODE=1 SCHEMATHESIS_HOOKS=hooks "$cache/venv/bin/st" --no-color run "$base/openapi.json" --checks all \
    --exclude-path /v1/live --continue-on-failure --max-examples "${EXAMPLES:-20}" --seed "${SEED:-7}" --generation-database none \
    --request-timeout 60 --warnings off "$@") || failed+=("$name")
}
failed=()

created=$("$ERNIE" keys create contract --scopes chat,completions,embeddings,tokenize,models,metrics,admin --database "sqlite:$databases/keys.db")
key=$(grep -o 'ernie_[0-9a-f]*_[0-9a-f]*' <<< "$created")
id=${key#ernie_}
serve keys
CONTRACT_KEY_ID=${id%%_*} check "with a key" --header "Authorization: Bearer $key"

serve none
# The first key that is made ends this.
check "without keys" --exclude-name 'POST /admin/api/keys'
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'FAILED: %s\n' "${failed[@]}"
  exit 1
fi
