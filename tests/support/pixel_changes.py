"""Code changes that affect a crop's pixels or the reference's logits."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from clipdeploy.imaging import keys

__all__ = ["PIXEL_CHANGES", "change_pixels", "change_source"]

PIXEL_CHANGES = (
    "clipdeploy.imaging.archives",
    "clipdeploy.imaging.decoding",
    "clipdeploy.imaging.fingerprints",
    "clipdeploy.imaging.loader",
    "clipdeploy.imaging.preprocess",
    "Pillow",
    "NumPy",
    "libjpeg_turbo",
    "zlib",
    "webp",
    "libtiff",
    "jpg_2000",
    "avif",
)


def change_source(module: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Replace the source of the loaded ``module`` by an edited copy."""
    found = sys.modules[module].__spec__
    assert found is not None
    assert found.origin is not None
    edited = folder / f"{module}.py"
    edited.write_bytes(Path(found.origin).read_bytes() + b"#")
    monkeypatch.setattr(found, "origin", str(edited))


def change_pixels(what: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Apply one of :data:`PIXEL_CHANGES`."""
    if what.startswith("clipdeploy."):
        change_source(what, monkeypatch, folder)
    elif what == "Pillow":
        monkeypatch.setattr(keys, "pillow_version", "0.0.0")
    elif what == "NumPy":
        monkeypatch.setattr(np, "__version__", "0.0.0")
    else:
        real = features.version
        monkeypatch.setattr(
            features, "version", lambda name: "0.0.0" if name == what else real(name)
        )
