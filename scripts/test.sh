#!/usr/bin/env bash
# All tests. Makes a .venv if there is none. Arguments go to pytest, such as -m 'not slow'.
source "$(dirname "$0")/environment.sh" "[test]"
say "running: pytest $*"
python -m pytest "$@"
