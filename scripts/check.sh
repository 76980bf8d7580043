#!/usr/bin/env bash
# Check lint, format, types and layers. Creates .venv if it is missing.
source "$(dirname "$0")/environment.sh" "[check]"
say "ruff"
ruff check .
ruff format --check .
say "mypy --strict"
mypy
say "import-linter"
lint-imports
