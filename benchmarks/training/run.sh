#!/usr/bin/env bash
# Training speed and memory beside PyTorch: benchmarks/training/run.sh --help. PYTHON names an interpreter with requirements.txt.
exec "${PYTHON:-python3}" "$(dirname "$0")/compare.py" "$@"
