#!/usr/bin/env bash
# The whole pipeline on real images: export, calibrate, INT8, TensorRT engines, verdict.
# Creates .venv if it is missing. Arguments are passed to `clipdeploy demo`.
source "$(dirname "$0")/environment.sh" ""
say "running: clipdeploy demo $*"
clipdeploy demo "$@"
