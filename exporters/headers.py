"""Reads the nodes and the passport of an ONNX file without loading its weights.

A ViT-B has 350 MB of weights and 60 kB of graph.  The file is memory-mapped and parsed field by
field (protobuf.dev, "Encoding"); fields that hold weights are skipped.  Reading a passport does not
import onnx.

Weights that are too large for the file are in one file beside it (:mod:`exporters.graphs`), whose
SHA-256 is in the passport, so that the SHA-256 of the graph covers both.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, FileError, GraphError
from clipdeploy.core.files import file_errors, open_regular, sha256_file
from clipdeploy.core.passport import PASSPORT_KEY, WEIGHTS_ROLE, Passport, from_json

if TYPE_CHECKING:
    import onnx

__all__ = [
    "GraphArtifact",
    "check_weights",
    "data_name",
    "existing_graph",
    "graph_sha256",
    "has_passport",
    "not_a_graph",
    "read_passport",
    "read_skeleton",
    "refuse_outside",
    "weight_files",
    "weight_head",
]

# Field numbers in onnx.proto3 of ModelProto, GraphProto and StringStringEntryProto.
_GRAPH, _METADATA = 7, 14
_NODE = 1
_KEY, _VALUE = 1, 2
# ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_WEIGHTS = (_GRAPH, 5, 9)
# The fields of each message that contain tensors, directly or in another message, by number.
_WITH_TENSORS = {
    "model": {_GRAPH: "graph", 25: "function"},
    "graph": {_NODE: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
# TensorProto.external_data, TensorProto.data_location, and its value EXTERNAL.
_EXTERNAL, _LOCATION, _OUTSIDE = 13, 14, 1
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Constants up to this size in bytes are kept: shapes, axes, scales.
_SMALL = 4096
# Hex digits of the SHA-256 in the name of a file of weights.
_DIGITS = 16


@dataclass(frozen=True)
class GraphArtifact(Shown):
    """An ONNX file: path, SHA-256, passport, size with its weights, and node count.

    ``changed`` is False if the file existed already and was reused.
    """

    path: Path
    sha256: str
    passport: Passport
    bytes: int
    nodes: int
    changed: bool

    def __rich__(self) -> Renderable:
        made = self.passport
        return facts(
            [
                ("graph", f"{self.path}: {self.nodes} nodes, {self.bytes / 1e6:.1f} MB"),
                ("model", f"{made.model}, {made.precision}"),
                ("SHA-256", self.sha256),
                ("made", "now" if self.changed else "before; nothing has changed since"),
            ]
        )


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield number, start, payload start and end of each field between ``at`` and ``end``."""
    while at < end:
        start = at
        # Most keys and sizes have a single byte.
        key, at = data[at], at + 1
        if key > 0x7F:
            key, at = _varint(data, start)
        wire_type = key & 7
        if wire_type == _LENGTH:
            size, payload = data[at], at + 1
            if size > 0x7F:
                size, payload = _varint(data, at)
            at = payload + size
        elif wire_type == _VARINT:
            payload = at
            _, at = _varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64):
            payload, at = at, at + (4 if wire_type == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire_type}")
        if at > end:
            raise ValueError("truncated")
        yield key >> 3, start, payload, at


def _encoded(number: int, payload: bytes) -> bytes:
    return _field_head(number, len(payload)) + payload


def _field_head(number: int, size: int) -> bytes:
    """Return what precedes the ``size`` bytes of a message, string or bytes field.

    The field's ``number`` is below 16, as all of ModelProto, GraphProto and TensorProto here.
    """
    length = bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([number << 3 | _LENGTH]) + bytes([*length, size])


def weight_head(tensor: bytes, size: int) -> bytes:
    """Return what precedes the ``size`` bytes of a weight in a file, as a message of its own.

        model { graph { initializer { tensor raw_data } } }

    ``tensor`` is the weight as TensorProto without values.
    """
    head = tensor + _field_head(_WEIGHTS[2], size)
    for number in reversed(_WEIGHTS[:2]):
        head = _field_head(number, len(head) + size) + head
    return head


def _without_weights(data: mmap.mmap, at: int, end: int, path: tuple[int, ...]) -> bytes:
    """Return a message without its weights; ``path`` holds the field numbers down to them."""
    pieces = []
    for number, start, payload, stop in _fields(data, at, end):
        if number != path[0] or stop - payload <= _SMALL:
            pieces.append(data[start:stop])
        elif len(path) > 1:
            inner = _without_weights(data, payload, stop, path[1:])
            pieces.append(_encoded(number, inner))
    return b"".join(pieces)


def _messages(data: mmap.mmap, at: int, end: int, field: int) -> Iterator[tuple[int, int]]:
    """Yield payload start and end of each occurrence of a field number in a message."""
    for number, _, payload, stop in _fields(data, at, end):
        if number == field:
            yield payload, stop


def _text(data: mmap.mmap, at: int, end: int, field: int) -> str:
    """Return a string field of a message, or an empty string if the field is missing."""
    found = [data[start:stop] for start, stop in _messages(data, at, end, field)]
    return found[-1].decode() if found else ""


def not_a_graph(path: Path) -> GraphError:
    """Return the error for a file that cannot be parsed as an ONNX graph."""
    return GraphError(
        f"{path} is not a readable ONNX graph",
        hint="it is truncated or another type of file: export it again",
    )


def _tensors(data: mmap.mmap, at: int, end: int, kind: str = "model") -> Iterator[tuple[int, int]]:
    """Yield start and end of every tensor in a message of type ``kind``, at any depth."""
    if kind == "tensor":
        yield at, end
        return
    inner = _WITH_TENSORS[kind]
    for number, _, payload, stop in _fields(data, at, end):
        if number in inner:
            yield from _tensors(data, payload, stop, inner[number])


def _outside_file(data: mmap.mmap, at: int, end: int) -> str | None:
    """Return the external file with the values of a tensor, None if they are in the tensor."""
    found = [entry for number, *entry in _fields(data, at, end) if number == _LOCATION]
    # Each entry is (field start, payload start, end).
    if not any(_varint(data, start)[0] == _OUTSIDE for _, start, _ in found):
        return None
    entries = {
        _text(data, *entry, _KEY): _text(data, *entry, _VALUE)
        for entry in _messages(data, at, end, _EXTERNAL)
    }
    return entries.get("location", "")


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Yield the memory-mapped bytes of an ONNX file; report parse errors of the block."""
    broken = not_a_graph(path)
    with file_errors("read", path), open_regular(path) as stream:
        if not os.fstat(stream.fileno()).st_size:
            raise broken
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield data
            except (IndexError, ValueError, RecursionError) as error:
                raise broken from error


def read_skeleton(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without the values of large initializers: names, types and shapes only.

    Raises:
        FileError: the file cannot be opened.
        GraphError: it is not an ONNX file, or is truncated.
    """
    import onnx
    from google.protobuf.message import DecodeError

    with _mapped(path) as data:
        light = _without_weights(data, 0, len(data), _WEIGHTS)
        try:
            model: onnx.ModelProto = onnx.ModelProto.FromString(light)
        except DecodeError as error:
            raise ValueError(str(error)) from error
    return model


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the external data files of an ONNX file, sorted by name.

    Raises:
        FileError, GraphError: the file cannot be read, or its external data is in another folder.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    from exporters.nested import all_tensors

    names = {
        ExternalDataInfo(tensor).location
        for tensor in all_tensors(read_skeleton(path))
        if uses_external_data(tensor)
    }
    refuse_outside(path, names)
    return tuple(path.parent / name for name in sorted(names))


def refuse_outside(path: Path, names: Iterable[str]) -> None:
    """Raise an error if the graph at ``path`` keeps weights in a file outside its folder.

    Raises:
        GraphError: a name is absolute, has a drive, or contains ``..``.
    """
    for name in names:
        location = PurePosixPath(name.replace("\\", "/"))
        elsewhere = location.is_absolute() or PureWindowsPath(name).drive or not location.parts
        if elsewhere or ".." in location.parts:
            raise GraphError(
                f"{path} keeps weights in {name!a}, outside its folder",
                hint="move them into the folder of the graph and save it again",
            )


def data_name(graph: str, digest: str) -> str:
    """The name of the file with the weights of the file ``graph``, from their SHA-256.

    The new weights of a graph never have the name of the old ones, so that replacing the graph
    replaces both.
    """
    return f"{graph}.{digest[:_DIGITS]}.data"


def check_weights(path: Path) -> None:
    """Compare the file with the weights of a graph, if they are not inside, with its passport.

    Raises:
        FileError: a file cannot be read.
        ArtifactError: the passport is missing or invalid, or the file of the weights is missing or
            differs from the passport.
    """
    passport, _, data = _read_header(path)
    if data is not None and (found := sha256_file(data)) != passport.parents[WEIGHTS_ROLE]:
        raise ArtifactError(
            f"{data} has changed since {path.name} was written: its SHA-256 starts with "
            f"{found[:8]}, not {passport.parents[WEIGHTS_ROLE][:8]}",
            hint="copy it again together with the graph, or create the graph again",
        )


def graph_sha256(path: Path) -> str:
    """Return the SHA-256 of a graph with a passport, see :func:`check_weights`.

    Raises:
        FileError, ArtifactError: see :func:`check_weights`.
    """
    check_weights(path)
    return sha256_file(path)


def existing_graph(path: Path) -> GraphArtifact | None:
    """Return the graph at ``path`` with ``changed`` False, None if missing or not readable."""
    try:
        passport, nodes, data = _read_header(path)
        digest = graph_sha256(path)
    except (ArtifactError, FileError):
        return None
    size = sum(file.stat().st_size for file in (path, data) if file is not None)
    return GraphArtifact(path, digest, passport, size, nodes, False)


def has_passport(path: Path) -> bool:
    """Return whether an ONNX file contains a passport, valid or not.

    Raises:
        FileError: the file cannot be opened.
        GraphError: it is not an ONNX file.
    """
    return _header(path)[0] is not None


def read_passport(path: Path) -> Passport:
    """Return the passport in an ONNX file.

    Raises:
        FileError: the file cannot be opened.
        ArtifactError: the passport is missing or invalid, or the weights are in another file that
            is missing or that the passport does not name.
    """
    return _read_header(path)[0]


def _outside_weights(path: Path) -> list[str]:
    """Return the names of the external data files of an ONNX file, sorted."""
    with _mapped(path) as data:
        files = {_outside_file(data, *tensor) for tensor in _tensors(data, 0, len(data))}
    return sorted(name for name in files if name is not None)


def _header(path: Path) -> tuple[str | None, int]:
    """Return the passport as text, None if it is missing, and the number of nodes."""
    with _mapped(path) as data:
        whole = 0, len(data)
        entries = {
            _text(data, *entry, _KEY): _text(data, *entry, _VALUE)
            for entry in _messages(data, *whole, _METADATA)
        }
        graphs = _messages(data, *whole, _GRAPH)
        nodes = sum(1 for graph in graphs for _ in _messages(data, *graph, _NODE))
    return entries.get(PASSPORT_KEY), nodes


def _read_header(path: Path) -> tuple[Passport, int, Path | None]:
    """Return the passport, the number of nodes, and the file with the weights if there is one."""
    try:
        text, nodes = _header(path)
        outside = _outside_weights(path)
    except GraphError as error:
        raise ArtifactError(error.message, hint=error.hint) from error
    if text is None:
        raise ArtifactError(
            f"{path} has no passport: clipdeploy did not write it", hint="export it with clipdeploy"
        )
    passport = from_json(text, Passport, f"the passport of {path}")
    return passport, nodes, _own_weights(path, passport, outside)


def _own_weights(path: Path, passport: Passport, outside: list[str]) -> Path | None:
    """Return the file beside a graph with its weights, None if they are inside.

    Raises:
        ArtifactError: it is missing, or is not the one that the passport names.
    """
    if not outside:
        return None
    ending = data_name("", passport.parents.get(WEIGHTS_ROLE, ""))
    for name in outside:
        own = WEIGHTS_ROLE in passport.parents and name.endswith(ending)
        if not own or set(name) & set("/\\:"):
            raise ArtifactError(
                f"{path} keeps weights in {name}, which its passport does not cover",
                hint="export it again, or save it with its weights inside",
            )
    data = path.parent / outside[0]
    if len(outside) > 1 or not data.is_file():
        raise ArtifactError(
            f"{path} keeps its weights in {', '.join(outside)}, which is missing",
            hint="copy both files together, or create the graph again",
        )
    return data
