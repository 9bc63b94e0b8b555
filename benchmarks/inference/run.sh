#!/usr/bin/env bash
# Speed and memory of inference beside other programs, after setup.sh: benchmarks/inference/run.sh --help. PYTHON names the interpreter,
# 3.10 or newer; it needs no packages.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/compare.py" "$@"
