"""Reads the index of a checkpoint in shards: which file beside it has which tensor.

    {"metadata": {...}, "weight_map": {"head.bias": "model-00002-of-00002.safetensors", ...}}

The index is untrusted: a name of a shard is that of a file in the folder of the index.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import CheckpointError, first_line
from clipdeploy.core.files import read_regular

__all__ = ["json_file", "read_index", "shard_names"]

_MOST_BYTES = 16 << 20


def json_file(path: Path) -> Any:
    """The content of a JSON file beside a checkpoint.

    Raises:
        FileError: it cannot be opened, or is too large.
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(read_regular(path, _MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {first_line(error)}", hint="download it again"
        ) from error


def read_index(path: Path) -> dict[str, str]:
    """The file name of the shard of each tensor.

    Raises:
        FileError: see :func:`json_file`.
        CheckpointError: it is not an index, or names a file outside its folder.
    """
    content = json_file(path)
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise CheckpointError(f"{path} has no weight_map", hint="download it again")
    named = {str(tensor): str(name) for tensor, name in places.items()}
    if bad := [name for name in named.values() if not _is_beside(name)]:
        raise CheckpointError(
            f"{path} names a file outside its folder: {bad[0]!a}", hint="download it again"
        )
    return named


def shard_names(path: Path) -> list[str]:
    """The names of the shards that an index names, sorted.

    Raises:
        FileError, CheckpointError: see :func:`read_index`.
    """
    return sorted(set(read_index(path).values()))


def _is_beside(name: str) -> bool:
    """Whether it is a file's name; one with a folder could lead anywhere."""
    return Path(name).name == name != "" and "\0" not in name and not name.startswith(".")
