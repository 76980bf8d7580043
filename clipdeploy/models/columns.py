"""The values of columns in tables of models; each function raises ValueError with the fault."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from clipdeploy.core.spans import CROP_PCT
from clipdeploy.core.values import is_name
from clipdeploy.models.hub import HUB_PREFIX, INDEX, hub_parts

__all__ = [
    "address",
    "count",
    "crop_pct",
    "hash_prefix",
    "hub_name",
    "known",
    "name_text",
    "one_of",
    "percent",
]


def count(text: str) -> int:
    """A whole number from 1."""
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is less than 1")
    return number


def name_text(text: str) -> str:
    """A name that may become a file's name."""
    if not is_name(text):
        raise ValueError(f"{text!r} is not a name of letters, digits and _.-")
    return text


def percent(text: str) -> float:
    """A number from 0 to 100."""
    if not 0 <= (number := float(text)) <= 100:
        raise ValueError(f"{number:g} is not from 0 to 100")
    return number


def crop_pct(text: str) -> float:
    """The part of the resized edge that the crop takes."""
    if (number := float(text)) not in CROP_PCT:
        raise ValueError(f"{number:g} is not from {CROP_PCT.text}")
    return number


def hub_name(text: str) -> str:
    """A repository of the Hugging Face hub, ``OWNER/NAME``."""
    owner, mark, name = text.partition("/")
    if not (mark and is_name(owner) and is_name(name)):
        raise ValueError(f"{text!r} is not OWNER/NAME")
    return text


def address(text: str) -> str:
    """``hf://OWNER/NAME``, an index of shards in it, or the name of a file, which the cache gets.

    Only the hub's shards are downloaded, so another index is refused.
    """
    if text.startswith(HUB_PREFIX):
        hub_parts(text)
    elif not is_name(text):
        raise ValueError(f"{text!r} is neither a file name nor hf://OWNER/NAME")
    elif text.endswith(INDEX):
        raise ValueError(f"{text!r} is an index of shards, which only hf://OWNER/NAME/ can have")
    return text


def hash_prefix(text: str) -> str:
    """The start of a SHA-256, or all of it, in hex."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", text):
        raise ValueError(f"{text!r} is not the first 8 hex digits of a SHA-256, or more")
    return text


def one_of(*names: str) -> Callable[[str], str]:
    """One of these names."""

    def checked(text: str) -> str:
        if text not in names:
            raise ValueError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return checked


def known(value: float) -> float | None:
    """None for NaN, which takes the place of a blank number."""
    return value if math.isfinite(value) else None
