"""Recognise image files by their suffix, or by their content if the suffix is unclear.

Image formats are those that Pillow decodes itself.  Formats that it passes to other programs (EPS
to Ghostscript) or opens without decoding (GRIB, HDF5, ...) are excluded.
"""

from __future__ import annotations

from functools import cache
from pathlib import PurePosixPath
from typing import IO

from PIL import Image

__all__ = [
    "HEAD_BYTES",
    "OPEN_ERRORS",
    "begins_like_an_image",
    "has_doubtful_suffix",
    "has_image_suffix",
    "is_decoded",
    "may_be_an_image",
    "opens",
]

# Raised by Pillow for a file that it cannot open; the warning only if the user's filters turn
# warnings into errors.
OPEN_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
_NOT_DECODED = frozenset(("BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# Suffixes that other file types use too: Pillow decides by the header.
_DOUBTFUL = frozenset((".bw", ".cur", ".im", ".ras", ".rgb", ".rgba", ".tga", ".vst", ".xpm"))
# Suffixes of files that are never images, so they need not be opened.
_KNOWN_OTHERS = frozenset(
    f".{suffix}"
    for suffix in (
        *("cfg", "csv", "db", "gz", "h5", "html", "ini", "ipynb", "json", "jsonl", "lock", "log"),
        *("mat", "md", "npy", "npz", "pickle", "pkl", "py", "rst", "sh", "tar", "toml", "tsv"),
        *("txt", "xml", "yaml", "yml", "zip"),
    )
)
# Enough for the longest signature, that of ISO media: "....ftypavif".
HEAD_BYTES = 16
_BRANDS = (b"avif", b"avis", b"mif1", b"heic", b"heix", b"msf1")


def is_decoded(kind: str | None) -> bool:
    """Whether Pillow itself decodes this format."""
    return kind not in _NOT_DECODED


@cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(
        suffix
        for suffix, kind in Image.EXTENSION.items()
        if kind in Image.OPEN and is_decoded(kind)
    )


def has_image_suffix(name: str) -> bool:
    """Whether the suffix alone identifies an image."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix not in _DOUBTFUL and suffix in _suffixes()


def has_doubtful_suffix(name: str) -> bool:
    """Whether the suffix is used for images and for other files."""
    return PurePosixPath(name).suffix.lower() in _DOUBTFUL


def opens(stream: IO[bytes]) -> bool:
    """Whether Pillow opens a file as an image; only its header is read."""
    try:
        with Image.open(stream) as image:
            return is_decoded(image.format)
    except OPEN_ERRORS:
        return False


def may_be_an_image(name: str) -> bool:
    """Whether the content has to be checked: the suffix does not rule out an image."""
    return PurePosixPath(name).suffix.lower() not in _KNOWN_OTHERS


def begins_like_an_image(head: bytes) -> bool:
    """Whether the first ``HEAD_BYTES`` bytes of a file are those of an image.

    Recognises JPEG, PNG, GIF, BMP, TIFF, WebP, AVIF, HEIC, JPEG 2000 and the netpbm formats, whose
    mark has to be followed by white space.
    """
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        return head[8:12] in _BRANDS
    if head[:1] == b"P" and head[1:2] in b"1234567fF" and len(head) > 2:
        return head[2:3] in b" \t\r\n"
    if head[:2] == b"BM":
        # Bytes 6 to 9 are reserved zeros, unlike those of a text that begins with BM.
        return len(head) >= 10 and not any(head[6:10])
    return head.startswith(
        (
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF87a",
            b"GIF89a",
            b"II*\0",
            b"MM\0*",
            b"\0\0\0\x0cjP  ",
            b"\xff\x4f\xff\x51",
        )
    )
