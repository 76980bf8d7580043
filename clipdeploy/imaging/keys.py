"""What decides the pixels of a crop, as one short key.

Whatever is kept of crops or was computed from them is kept under this key, so that no change of a
setting, of a library or of our own code is answered with what another one made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import __version__ as pillow_version
from PIL import features

from clipdeploy.core.passport import Preprocess, settings_of

__all__ = ["digest_of", "pixels_key", "sources"]

# Our own code between a file's bytes and its crop.
_DECIDES_PIXELS = (
    "clipdeploy.imaging.archives",
    "clipdeploy.imaging.decoding",
    "clipdeploy.imaging.fingerprints",
    "clipdeploy.imaging.loader",
    "clipdeploy.imaging.preprocess",
)
_BEHIND_THE_CROP = ("mean", "std")
# Whatever Pillow decodes with: a file may be of another format than its name says.
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
    """Sixteen hex digits of everything that decides the pixels of a crop.

    Settings, the source text of our modules, and the versions of Pillow, its codecs and NumPy.
    Mean and standard deviation are not among them: they come after the crop.
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
    """SHA-256 in hex of the source text of these modules; none of them is imported for it.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    digest = hashlib.sha256()
    for name in modules:
        found = find_spec(name)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(f"no source of {name}")
        digest.update(hashlib.sha256(Path(found.origin).read_bytes()).digest())
    return digest.hexdigest()


def digest_of(decides: object) -> str:
    """Sixteen hex digits of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]
