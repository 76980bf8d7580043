#!/usr/bin/env bash
# All tests, in a process for each core. Makes a .venv if there is none. Arguments go to pytest, such
# as -m 'not slow', or -n 0 for a single process.
source "$(dirname "$0")/environment.sh" "[test]"
# One thread for each process: on these small models, more threads cost more CPU time than they save, and
# threads of PyTorch that spin while they wait would take the cores from the other process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
say "running: pytest $*"
python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
