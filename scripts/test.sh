#!/usr/bin/env bash
# All tests, in a process for each core. Makes a .venv if there is none. Arguments go to pytest, such
# as -m 'not slow', or -n 0 for a single process.
source "$(dirname "$0")/environment.sh" "[test]"
# Threads of PyTorch that spin while they wait would take the cores from the other process.
export OMP_WAIT_POLICY=passive
say "running: pytest $*"
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
