"""Compute the cache key of everything that determines a crop's pixels.

Crops, and results computed from them, are cached under this key, so a change of a setting, a
library or this package's code invalidates them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow_version
from PIL import features

from clipdeploy.core.passport import Preprocess, settings_of

__all__ = ["digest_of", "pixels_key", "sources"]

# The modules that turn a file's bytes into a crop.
_DECIDES_PIXELS = (
    "clipdeploy.imaging.archives",
    "clipdeploy.imaging.decoding",
    "clipdeploy.imaging.fingerprints",
    "clipdeploy.imaging.loader",
    "clipdeploy.imaging.preprocess",
)
_BEHIND_THE_CROP = ("mean", "std")
# All of Pillow's codecs: a file's format may differ from its suffix.
_CODECS = (
    "jpg",
    "libjpeg_turbo",
    "mozjpeg",
    "jpg_2000",
    "zlib",
    "zlib_ng",
    "libtiff",
    "webp",
    "avif",
)


def pixels_key(spec: Preprocess) -> str:
    """Hash everything that determines a crop's pixels, as 16 hex digits.

    Covers the settings, the source code of the modules involved, and the versions of Pillow, its
    codecs and NumPy.  Mean and standard deviation are excluded: they apply after the crop.
    """
    return digest_of(
        {
            "settings": {k: v for k, v in settings_of(spec).items() if k not in _BEHIND_THE_CROP},
            "code": sources(_DECIDES_PIXELS),
            "pillow": pillow_version,
            "codecs": [features.version(codec) for codec in _CODECS],
            "numpy": np.__version__,
        }
    )


def sources(modules: Iterable[str]) -> str:
    """Hash the source code of modules without importing them; hex SHA-256.

    Raises:
        ModuleNotFoundError: a module or its source does not exist.
    """
    digest = hashlib.sha256()
    for name in modules:
        digest.update(hashlib.sha256(_source(name).read_bytes()).digest())
    return digest.hexdigest()


def _source(module: str) -> Path:
    if module in sys.modules:
        found = find_spec(module)
        if found is not None and found.origin is not None:
            return Path(found.origin)
    # find_spec() of a module inside a package imports the package, and with it PyTorch.
    package, *parts = module.split(".")
    outer = find_spec(package)
    for folder in (outer and outer.submodule_search_locations) or ():
        path = Path(folder, *parts).with_suffix(".py")
        if path.is_file():
            return path
    raise ModuleNotFoundError(f"no source of {module}")


def digest_of(decides: object) -> str:
    """Hash a JSON-serialisable object, as 16 hex digits."""
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
