#!/usr/bin/env bash
# Speed of the main job on this machine: training tokens per second of recipes/nano.toml, and from `ernie generate` to the first token
# with the embedded model. Needs ERNIE_DATA; run it on an idle machine and put what it prints under benchmarks/records/.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${ERNIE_DATA:?set ERNIE_DATA to the data root that recipes/nano.toml describes}"
cargo build --quiet --release --locked
ernie=$PWD/target/release/ernie
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$ernie" train recipes/nano.toml --steps 110 --out "$work/run" --quiet > /dev/null
for _ in 1 2 3 4 5 6 7; do
  start=$(date +%s%N)
  "$ernie" generate "Once upon a time" --max-tokens 1 --temperature 0 > /dev/null
  echo $((($(date +%s%N) - start) / 1000)) >> "$work/first_token_us"
  "$ernie" generate "Once upon a time" --max-tokens 200 --temperature 0.8 --seed 1 --json >> "$work/generate.jsonl"
done
date=$(date +%F) commit=$(git rev-parse --short HEAD)
python3 - "$work" "$date" "$commit" <<'REPORT'
import json, os, statistics, sys
sys.path.insert(1, "benchmarks")
import processor
work, date, commit = sys.argv[1:]
lines = [json.loads(line) for line in open(f"{work}/run/metrics.jsonl")]
# The first ten steps warm the allocator and the caches.
rates = [line["tok_s"] for line in lines if line["kind"] == "train" and line["step"] > 10]
first = [int(line) / 1e3 for line in open(f"{work}/first_token_us")][1:]
decode = [json.loads(line)["timings"]["decode_tokens_per_second"] for line in open(f"{work}/generate.jsonl")][1:]
print(f"date {date}, commit {commit}, {os.cpu_count()} x {processor.name()}")
row = lambda name, values, unit: print(f"{name:<44}{min(values):>10.1f}{statistics.median(values):>10.1f}{max(values):>10.1f}  {unit}")
print(f"{'':<44}{'min':>10}{'median':>10}{'max':>10}")
row("training, recipes/nano.toml", rates, "tok/s")
row("ernie generate, whole process, one token", first, "ms")
row("decoding, embedded model", decode, "tok/s")
REPORT
