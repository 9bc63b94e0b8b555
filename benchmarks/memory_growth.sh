#!/usr/bin/env bash
# Does a long training grow? Trains a small mixture of experts for 2,000 steps on this repository's own documents, validating and writing checkpoints
# all along, and reads the process's resident memory every 100 steps from step 200 on. Fails if it has grown by more than 2 %.
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
log_every = 100

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

"$ERNIE" train "$work/recipe.toml" --data "$PWD" --quiet "$@" > "$work/report" &
trainer=$!
seen=0
while kill -0 "$trainer" 2>/dev/null; do
  lines=$(grep -c '"kind":"train"' "$work/run/metrics.jsonl" 2>/dev/null) || true
  if [ "${lines:-0}" -gt "$seen" ]; then
    seen=$lines
    step=$(grep '"kind":"train"' "$work/run/metrics.jsonl" | tail -1 | sed 's/.*"step":\([0-9]*\).*/\1/')
    rss=$(awk '/^VmRSS:/ { print $2 }' "/proc/$trainer/status" 2>/dev/null) || true
    [ -z "$rss" ] || echo "$step $rss" >> "$work/samples"
  fi
  sleep 0.02
done
wait "$trainer"
cat "$work/report"
echo
awk '
  $1 >= 200 { if (!first) first = $2; if ($2 > most) most = $2; samples++; printf "step %5d  %8d KiB\n", $1, $2 }
  END {
    if (samples < 15) { printf "only %d samples: too fast for this script\n", samples; exit 1 }
    growth = (most / first - 1) * 100
    printf "grew by %.2f %% at most after step 200, 2 %% are allowed\n", growth
    exit growth > 2
  }' "$work/samples"
