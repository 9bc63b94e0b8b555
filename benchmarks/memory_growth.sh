#!/usr/bin/env bash
# Does a long training grow? Trains a small mixture of experts for 2,000 steps on this repository's own documents, validating and writing checkpoints
# all along. From step 250 on it reads, every 100 steps and half-way between two checkpoints, the process's resident memory and the peak of it,
# which the checkpoints' copies are part of. Fails if either has grown by more than 2 % over what it was at the first of these steps.
#
#   benchmarks/memory_growth.sh [flags of `ernie train`, such as --precision int8-mixed]
#   ERNIE=path/to/ernie            a program that is built already
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${ERNIE:-}" ]; then
  cargo build --quiet --release --locked
  ERNIE=$PWD/target/release/ernie
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/recipe.toml" <<RECIPE
[run]
name = "memory_growth"
out = "$work/run"
steps = 2000
validate_every = 100
validate_tokens = 2048
checkpoint_every = 100
log_every = 50

[model]
architectures = ["Ernie4_5_MoeForCausalLM"]
model_type = "ernie4_5_moe"
vocab_size = 1024
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 3
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 16
max_position_embeddings = 128
tie_word_embeddings = true
use_bias = false
moe_num_experts = 4
moe_k = 2
moe_intermediate_size = 64
moe_num_shared_experts = 1
moe_layer_start_index = 1

[tokenizer]
vocab_size = 1024

[data]
sequence_length = 128
batch_size = 4
validation_fraction = 0.1

[[data.source]]
name = "documents"
format = "text"
paths = ["*.md", "benchmarks", "models", "testdata"]
weight = 1.0
licence = "Apache-2.0"

[schedule]
kind = "constant"
warmup_steps = 20
RECIPE

# Without huge pages, as the trainer sees to: the kernel may at any time fill a range that is in use in part with one, and resident memory rises
# by pages that nothing asked for.
"$ERNIE" train "$work/recipe.toml" --data "$PWD" --quiet "$@" > "$work/report" &
trainer=$!
seen=0
while kill -0 "$trainer" 2>/dev/null; do
  lines=$(grep -c '"kind":"train"' "$work/run/metrics.jsonl" 2>/dev/null) || true
  if [ "${lines:-0}" -gt "$seen" ]; then
    seen=$lines
    step=$(grep '"kind":"train"' "$work/run/metrics.jsonl" | tail -1 | sed 's/.*"step":\([0-9]*\).*/\1/')
    memory=$(awk '/^VmHWM:/ { peak = $2 } /^VmRSS:/ { print $2, peak }' "/proc/$trainer/status" 2>/dev/null) || true
    [ -z "$memory" ] || [ $((step % 100)) -ne 50 ] || echo "$step $memory" >> "$work/samples"
  fi
  sleep 0.02
done
wait "$trainer"
cat "$work/report"
echo
awk '
  $1 >= 250 {
    if (!first) { first = $2; first_peak = $3 }
    if ($2 > most) most = $2
    peak = $3; samples++
    printf "step %5d  resident %8d KiB  peak %8d KiB\n", $1, $2, $3
  }
  END {
    if (samples < 15) { printf "only %d samples: too fast for this script\n", samples; exit 1 }
    growth = (most / first - 1) * 100
    peak_growth = (peak / first_peak - 1) * 100
    printf "after step 250 resident memory grew by %.2f %% at most, its peak by %.2f %%; 2 %% are allowed\n", growth, peak_growth
    exit growth > 2 || peak_growth > 2
  }' "$work/samples"
