"""Where clipdeploy keeps what it need not fetch or make twice."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]

HOME_VARIABLE = "CLIPDEPLOY_HOME"


def cache_folder() -> Path:
    """``$CLIPDEPLOY_HOME``, else ``~/.cache/clipdeploy``."""
    chosen = os.environ.get(HOME_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "clipdeploy"
