#!/usr/bin/env bash
# The whole pipeline on real images: export, calibrate, INT8, TensorRT engines, verdict.
# Makes a .venv if there is none. Arguments go to `clipdeploy demo`.
source "$(dirname "$0")/environment.sh" ""
say "running: clipdeploy demo $*"
clipdeploy demo "$@"
