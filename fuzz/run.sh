#!/usr/bin/env bash
# Fuzzes what reads model directories: fuzz/run.sh [SECONDS of each target, default 180] [TARGET …]
#
# Needs cargo-fuzz: `cargo install cargo-fuzz --version 0.13.2 --locked`. The toolchain may be a stable one. Starts from fuzz/seeds; what is
# found on the way is kept in fuzz/corpus, an input that fails in fuzz/artifacts. Goes through all targets and fails if any did.
#   FUZZ_SANITIZER=address    also watch memory; slower, and what is read here is safe Rust
set -euo pipefail
cd "$(dirname "$0")"
export RUSTC_BOOTSTRAP=1 # libFuzzer's instrumentation needs flags that stable compilers hide
seconds=${1:-180}
shift || true
[ $# -gt 0 ] || set -- safetensors config sentencepiece tokenizer_json chat_template
failed=()
for target in "$@"; do
  echo "== $target, $seconds s"
  mkdir -p "corpus/$target"
  # In megabytes and seconds: what a file of a few KB must not need. Seconds are those of a machine that others may be using.
  cargo fuzz run --fuzz-dir . --sanitizer "${FUZZ_SANITIZER:-none}" "$target" "corpus/$target" "seeds/$target" -- \
    -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=100 -max_len=16384 -print_final_stats=1 || failed+=("$target")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
