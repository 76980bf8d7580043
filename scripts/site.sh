#!/usr/bin/env bash
# The documentation as a site, into site/. Fails at a broken link. Makes a .venv if there is none.
# Arguments go to `mkdocs build`.
source "$(dirname "$0")/environment.sh" "[docs]"
say "mkdocs build --strict"
NO_MKDOCS_2_WARNING=1 mkdocs build --strict "$@"
