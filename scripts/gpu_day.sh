#!/usr/bin/env bash
# Run the checks that need a GPU, and end with a table for a bug report: see scripts/bench/gpu_day.py
# and docs/gpu.md. With PYTHON=/path/to/python that Python runs this source tree and nothing is
# installed; else .venv is created if it is missing, with TensorRT where there is an NVIDIA driver.
# Arguments: --quick, --only STEP ..., --seconds N, --out FOLDER.
set -euo pipefail
if [ -n "${PYTHON:-}" ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
else
  extras="[test]"
  if command -v nvidia-smi >/dev/null; then extras="[test,tensorrt]"; fi
  source "$(dirname "$0")/environment.sh" "$extras"
fi
exec "${PYTHON:-python}" scripts/bench/gpu_day.py "$@"
