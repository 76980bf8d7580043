#!/usr/bin/env bash
# Run the whole pipeline on real images: export, calibrate, INT8, TensorRT engines, verdict.
# Creates a .venv if there is none. Arguments are passed to `clipdeploy demo`.
if [ ! -e "$(dirname "$0")/../.venv/installed" ]; then
  echo "pip downloads PyTorch, ONNX Runtime and TensorRT-RTX into .venv: about 0.6 GB, or more if it" \
    "finds only PyTorch's CUDA build. The demo itself downloads nothing." >&2
fi
source "$(dirname "$0")/environment.sh" ""
say "running: clipdeploy demo $*"
clipdeploy demo "$@"
