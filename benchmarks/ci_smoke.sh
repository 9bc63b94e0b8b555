#!/usr/bin/env bash
# A short version of the main job on real text, from raw files to a conversation: train a little, be killed, resume, generate, inspect.
# Needs ERNIE_DATA. Takes a few minutes after the build.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${ERNIE_DATA:?set ERNIE_DATA to the data root that recipes/nano.toml describes}"

out=target/ci/smoke
rm -rf "$out"
cargo build --quiet --release --locked
ernie=target/release/ernie

"$ernie" train recipes/nano.toml --steps 260 --out "$out" --dry-run
# Killed somewhere after its first checkpoint (the recipe writes one every 250 steps), then resumed to the end.
"$ernie" train recipes/nano.toml --steps 260 --out "$out" --quiet &
trainer=$!
while kill -0 "$trainer" 2>/dev/null && ! ls "$out"/checkpoints/step-* >/dev/null 2>&1; do sleep 0.2; done
kill -9 "$trainer" 2>/dev/null || true
wait "$trainer" 2>/dev/null || true
"$ernie" train recipes/nano.toml --steps 260 --out "$out" --quiet --json > "$out/report.json"

"$ernie" inspect "$out/model"
"$ernie" generate "Once upon a time" --model "$out/model" --max-tokens 20 --temperature 0
printf 'Hello!\n' | "$ernie" chat --model "$out/model" --max-tokens 20 --temperature 0
python3 - "$out/report.json" "$out/metrics.jsonl" <<'CHECK'
import json, sys
report = json.load(open(sys.argv[1]))
lines = [json.loads(line) for line in open(sys.argv[2])]
losses = [line["loss"] for line in lines if line["kind"] == "train"]
assert report["finished"] and report["steps"] == 260, report
assert losses[-1] < losses[0] - 3, f"the loss went from {losses[0]} to {losses[-1]}"
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {report['tokens_per_second']:.0f} tok/s")
CHECK
