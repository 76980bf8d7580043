"""The folder for downloads and other cached files."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]

HOME_VARIABLE = "CLIPDEPLOY_HOME"


def cache_folder() -> Path:
    """Return ``$CLIPDEPLOY_HOME``, by default ``~/.cache/clipdeploy``."""
    home = os.environ.get(HOME_VARIABLE)
    return Path(home) if home else Path.home() / ".cache" / "clipdeploy"
