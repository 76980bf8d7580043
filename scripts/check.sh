#!/usr/bin/env bash
# Lint, format, types and layers. Makes a .venv if there is none.
source "$(dirname "$0")/environment.sh" "[check]"
say "ruff"
ruff check .
ruff format --check .
say "mypy --strict"
mypy
say "import-linter"
lint-imports
