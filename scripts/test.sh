#!/usr/bin/env bash
# Run all tests. Creates .venv if it is missing. Arguments are passed to pytest, such as -m 'not slow'.
source "$(dirname "$0")/environment.sh" "[test]"
say "running: pytest $*"
python -m pytest "$@"
