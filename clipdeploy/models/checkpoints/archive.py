"""Opens checkpoint files: safetensors, PyTorch's zip and legacy pickles, and files in shards.

Pickles are read with ``weights_only=True``; where PyTorch refuses a file because of the objects in
it, :mod:`.unpickle` reads it without importing their classes.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdeploy.core.errors import CheckpointError, first_line
from clipdeploy.core.files import open_regular, sha256_file
from clipdeploy.core.interrupts import interrupts
from clipdeploy.models.checkpoints.unpickle import Inert, module_tensors, read_pickle
from clipdeploy.models.hub import INDEX, OPEN_CLIP_CONFIG, OPEN_CLIP_NAMES
from clipdeploy.models.shards import json_file, read_index

__all__ = ["METADATA_KEY", "Archive", "read_archive"]

METADATA_KEY = "clipdeploy"

# In a folder of Hugging Face's save_pretrained, or of open_clip's, in the order of preference.
_HUB_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    *OPEN_CLIP_NAMES,
)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<suffix>\.\w+)")
# In PyTorch's messages: the class that it refuses to load.
_CLASS = re.compile(r"\bGLOBAL ([\w.]+)")
# In PyTorch's messages: the advice to load the file in the unsafe way.
_ADVICE = re.compile(r"weights[_ ]only", re.IGNORECASE)
# Errors whose message describes the file; the message of others describes PyTorch's code.
_FILE_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class Archive:
    """What a checkpoint file contains.

    ``path`` is the file, or the index of its shards; ``kind`` its format.  ``loaded`` has
    plain dictionaries with text keys, also in place of modules and other objects.  ``config`` and
    ``preprocessor`` are the JSON files of Hugging Face's folders beside it, or open_clip's
    configuration, empty if there are none.  A file of clipdeploy's own has its ``config`` inside,
    under ``METADATA_KEY``.
    """

    path: Path
    sha256: str
    kind: str
    loaded: Any
    config: Mapping[str, Any]
    preprocessor: Mapping[str, Any]


def read_archive(path: Path) -> Archive:
    """Read a checkpoint file, the index or a shard of a sharded one, or a folder with either.

    Raises:
        FileError: the file does not exist or cannot be opened.
        CheckpointError: it is truncated, or in an unknown format.
    """
    path = _resolved(path)
    with open_regular(path):
        pass
    if path.name.endswith(INDEX):
        loaded, sha256 = _read_shards(path)
        kind = f"sharded {path.name.removesuffix(INDEX).rpartition('.')[2]}"
    else:
        loaded, sha256 = _load(path), sha256_file(path)
        kind = path.suffix.lstrip(".") or "pickle"
    of_open_clip = path.name in OPEN_CLIP_NAMES
    config = _own_config(path) or _side_file(
        path, OPEN_CLIP_CONFIG if of_open_clip else "config.json"
    )
    # open_clip's configuration has the preprocessing too.
    preprocessor = {} if of_open_clip else _side_file(path, "preprocessor_config.json")
    return Archive(path, sha256, kind, loaded, config, preprocessor)


def _resolved(path: Path) -> Path:
    if path.is_dir():
        return next((path / name for name in _HUB_NAMES if (path / name).exists()), path)
    if found := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{found['stem']}{found['suffix']}{INDEX}")
        if not index.exists():
            raise CheckpointError(
                f"{path} is one shard of a checkpoint, and its index {index.name} does not exist",
                hint="put all shards and the index into one folder and pass the index",
            )
        return index
    return path


def _side_file(path: Path, name: str) -> Mapping[str, Any]:
    """A JSON object beside a file with one of Hugging Face's names; empty if there is none."""
    beside = path.with_name(name)
    if path.name not in _HUB_NAMES or not beside.is_file():
        return {}
    found = json_file(beside)
    return found if isinstance(found, Mapping) else {}


def _own_config(path: Path) -> Mapping[str, Any]:
    """The configuration in the metadata of a safetensors file; empty if there is none."""
    from safetensors import safe_open

    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has damaged metadata: {first_line(error)}", hint="create it again"
        ) from error
    return found if isinstance(found, Mapping) else {}


def _read_shards(index: Path) -> tuple[dict[str, Any], str]:
    places = read_index(index)
    names = sorted(set(places.values()))
    tensors: dict[str, Any] = {}
    digest = hashlib.sha256(sha256_file(index).encode())
    for name in names:
        with open_regular(index.with_name(name)):
            pass
        digest.update(sha256_file(index.with_name(name)).encode())
        found = _load(index.with_name(name))
        # A shard of an earlier save may have tensors that the index places elsewhere.
        tensors |= {each: found[each] for each in found if places.get(each) == name}
    if missing := [name for name in places if name not in tensors]:
        raise CheckpointError(
            f"{index} lists {missing[0]!a}, which its shard does not contain",
            hint="download it again",
        )
    return tensors, digest.hexdigest()


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        return _plain(_load_pickle(path), {})
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {_reason(error)}",
            hint="the file is truncated or not a checkpoint: download it again",
        ) from error


def _load_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stop: list[BaseException] = []
    try:
        with interrupts(stop):
            loaded = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if stop:
        raise stop[0]
    return loaded


def _load_pickle(path: Path) -> Any:
    # Only the zip format can be memory-mapped; legacy pickles raise RuntimeError for mmap=True.
    with path.open("rb") as stream:
        mappable = stream.read(4) == b"PK\x03\x04"
    with warnings.catch_warnings():
        # Warnings about sparse tensors, which are refused.
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
        # RuntimeError: a TorchScript archive, whose code is not read.
        except (pickle.UnpicklingError, RuntimeError) as refused:
            try:
                return read_pickle(path)
            except Exception:  # damaged: PyTorch's reason is the better one
                raise refused from None


def _plain(value: Any, made: dict[int, Any]) -> Any:
    """The value with plain dictionaries with text keys; ``made`` has those that are done by id.

    A pickle can replace the methods of an ``OrderedDict`` by its attributes.
    """
    if not isinstance(value, dict | Inert):
        return value
    # A dictionary can contain itself.
    if id(value) not in made:
        plain: dict[str, Any] = {}
        made[id(value)] = plain
        found = value if isinstance(value, dict) else module_tensors(value) or value.entries
        plain |= {str(name): _plain(inner, made) for name, inner in dict.items(found)}
    return made[id(value)]


def _reason(error: Exception) -> str:
    """PyTorch's reason, without its advice to load the file in the unsafe way."""
    text = str(error)
    if found := _CLASS.search(text):
        return f"it contains an object of {found[1]}, and is damaged"
    if "TorchScript" in text:
        return "it is a TorchScript archive, and damaged"
    if _ADVICE.search(text):
        return "it contains other objects than tensors, or is damaged"
    if not isinstance(error, _FILE_ERRORS):
        return "it is damaged, or contains a dtype that the format does not support"
    # Only the first sentence: PyTorch appends advice.
    return first_line(error).split(". ")[0]
