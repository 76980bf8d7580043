"""Reads PyTorch pickles that name classes, without importing any of them.

Training checkpoints contain more than tensors: argparse's ``Namespace``, mmengine's
``HistoryBuffer``, configurations, whole models.  ``torch.load(weights_only=True)`` refuses such
files.  Here every global of a pickle is replaced: PyTorch's few tensor functions by the functions
below, all other functions and classes by :class:`Inert`.  So a pickle can only make tensors,
numbers, strings, containers and inert objects; nothing that it names is imported or called.

Formats: ``torch/serialization.py`` of PyTorch 2.13, ``_save`` (zip) and ``_legacy_save``.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["Inert", "module_tensors", "read_pickle"]

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
# The first object of the legacy format.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Of a zip's local file header: its size, and where the lengths of its name and extra field are.
_LOCAL_HEADER, _LENGTHS = 30, 26
_MAX_LEVELS = 64


class Inert:
    """Takes the place of an object whose class or function is not imported.

    ``state`` is the pickled state of the object, ``entries`` what was stored under its keys.
    """

    __slots__ = ("entries", "state")
    entries: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Take any arguments."""
        made = object.__new__(cls)
        made.state, made.entries = None, {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take any arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Take the place of a call's result."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Keep the state."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep an entry."""
        self.entries[key] = value

    def append(self, value: Any) -> None:
        """Ignore the item of a list."""

    def extend(self, values: Any) -> None:
        """Ignore the items of a list."""

    def add(self, value: Any) -> None:
        """Ignore the item of a set."""


@dataclass(frozen=True)
class _Stored:
    """The bytes of a tensor, and the type of its numbers."""

    storage: torch.UntypedStorage
    dtype: torch.dtype


class _Function:
    """A function that a pickle may call; a pickle cannot change it."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


class _Dict(dict[Any, Any]):
    """Takes the place of an OrderedDict, whose methods a pickle can replace by its attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes, such as the ``_metadata`` of a state dict."""


def _tensor(stored: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(stored, _Stored):
        raise pickle.UnpicklingError("a tensor has no storage")
    last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    # PyTorch would enlarge the storage.
    if 0 not in size and (last + 1) * stored.dtype.itemsize > stored.storage.nbytes():
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=stored.dtype).set_(stored.storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that imports nothing."""

    def __init__(self, stream: IO[bytes], storage: Callable[..., Any]) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self._storage = storage
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """See :class:`pickle.Unpickler`; nothing is imported."""
        if (module, name) not in self._known:
            self._known[module, name] = _replacement(module, name)
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """See :class:`pickle.Unpickler`: a storage, or in the legacy format a module's class."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to an unknown kind of record")
        kind, key, numel = pid[1], pid[2], pid[4]
        dtype = kind if isinstance(kind, torch.dtype) else None
        if dtype is None or not isinstance(numel, int) or numel < 0:
            raise pickle.UnpicklingError("it refers to an unknown type of storage")
        return _Stored(self._storage(str(key), numel * dtype.itemsize, *pid[5:]), dtype)


def _replacement(module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
        return _Dict
    if (module, name) in _FUNCTIONS:
        return _Function(_FUNCTIONS[module, name])
    if module in ("torch", "torch.storage", "torch.cuda") and name in _DTYPES:
        return _DTYPES[name]
    if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
        return dtype
    return type("Inert", (Inert,), {"__slots__": (), "__qualname__": f"{module}.{name}"})


def read_pickle(path: Path) -> Any:
    """Read a file of ``torch.save``, zip or legacy, with inert objects in place of all others.

    Raises:
        Exception: the file is damaged or in another format; damaged pickles can raise anything.
    """
    with path.open("rb") as stream:
        if stream.read(4) == b"PK\x03\x04":
            return _read_zip(path)
        stream.seek(0)
        return _read_legacy(stream, path.stat().st_size)


def _read_zip(path: Path) -> Any:
    size = path.stat().st_size
    whole = torch.UntypedStorage.from_file(str(path), False, size)
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        records = {name.partition("/")[2]: info for name, info in archive.NameToInfo.items()}
        if "byteorder" in records and archive.read(records["byteorder"]) == b"big":
            raise pickle.UnpicklingError("its numbers are big-endian")

        def storage(key: str, nbytes: int, *_: Any) -> torch.UntypedStorage:
            start = _data_start(stream, records[f"data/{key}"])
            if records[f"data/{key}"].file_size < nbytes or start + nbytes > size:
                raise pickle.UnpicklingError("a tensor is truncated")
            part: torch.UntypedStorage = whole[start : start + nbytes]
            return part

        start, length = _data_start(stream, records["data.pkl"]), records["data.pkl"].file_size
        stream.seek(start)
        return _Unpickler(io.BytesIO(stream.read(length)), storage).load()


def _data_start(stream: IO[bytes], record: zipfile.ZipInfo) -> int:
    """The offset of a record's bytes, which PyTorch never compresses."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("a record is compressed")
    stream.seek(record.header_offset)
    header = stream.read(_LOCAL_HEADER)
    name = int.from_bytes(header[_LENGTHS : _LENGTHS + 2], "little")
    extra = int.from_bytes(header[_LENGTHS + 2 : _LENGTHS + 4], "little")
    return record.header_offset + _LOCAL_HEADER + name + extra


def _read_legacy(stream: IO[bytes], size: int) -> Any:
    storages: dict[str, torch.UntypedStorage] = {}

    def storage(key: str, nbytes: int, *view: Any) -> torch.UntypedStorage:
        if view and view[0] is not None:
            raise pickle.UnpicklingError("it contains views of storages, as PyTorch 0.1 wrote them")
        if key not in storages:
            if nbytes + sum(each.nbytes() for each in storages.values()) > size:
                raise pickle.UnpicklingError("a tensor is truncated")
            storages[key] = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        return storages[key]

    def load() -> Any:
        return _Unpickler(stream, storage).load()

    if load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it is not a file of torch.save")
    _protocol, system, loaded, keys = load(), load(), load(), load()
    if isinstance(system, Mapping) and system.get("little_endian") is False:
        raise pickle.UnpicklingError("its numbers are big-endian")
    for key in keys:
        stream.read(8)  # the number of elements
        target = torch.empty(0, dtype=torch.uint8).set_(storages[str(key)])
        data = bytearray(stream.read(target.numel()))
        if len(data) != target.numel():
            raise pickle.UnpicklingError("a tensor is truncated")
        if data:
            target.copy_(torch.frombuffer(data, dtype=torch.uint8))
    return loaded


def module_tensors(module: Inert) -> dict[str, Tensor]:
    """The state dict of a pickled or scripted module: name -> tensor of any shape; else empty."""
    return dict(_named(module, "", 0))


def _named(module: Any, prefix: str, level: int) -> Iterator[tuple[str, Tensor]]:
    state = module.state if isinstance(module, Inert) else None
    if not isinstance(state, dict) or level > _MAX_LEVELS:
        return
    kinds = ("_parameters", "_buffers", "_modules")
    # In TorchScript, parameters, buffers and modules are attributes.
    scripted = type(module).__qualname__.startswith("__torch__.")
    parts = [state] if scripted else [state.get(kind) for kind in kinds]
    for name, value in (item for part in parts for item in _items(part)):
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        else:
            yield from _named(value, f"{prefix}{name}.", level + 1)


def _items(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []
