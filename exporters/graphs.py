"""Loads and saves complete ONNX files, including their weights.

A protobuf message has at most 2 GiB (protobuf.dev, "Proto Limits").  The weights of a larger graph
are in a file beside it, which the ONNX file names (onnx/docs/ExternalData.md).  Its name contains
its hash: the file is complete under that name before the graph refers to it, so that renaming the
graph replaces both, and a process that is killed leaves the old graph with its old weights.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_tensor,
    uses_external_data,
)

from clipdeploy.core.files import (
    atomic_path,
    file_errors,
    open_regular,
    read_regular,
    sha256_file,
)
from clipdeploy.core.passport import PASSPORT_KEY, WEIGHTS_ROLE, Passport, to_json
from exporters.headers import (
    GraphArtifact,
    data_name,
    not_a_graph,
    refuse_outside,
    weight_files,
    weight_head,
)
from exporters.initializers import tensor_of
from exporters.nested import all_tensors
from exporters.typed_graphs import dense

__all__ = [
    "is_large",
    "load_graph",
    "model_pieces",
    "read_proto",
    "save_graph",
    "structure",
    "weight_proto",
    "write_model",
]

_PRODUCER = "clipdeploy"
# Bytes of weights that one file holds, which leaves more than 100 MB for the nodes.
LARGEST_INSIDE = 2_000_000_000
# Smaller weights stay in the ONNX file, where shape inference needs some of them.
_SMALLEST_OUTSIDE = 1024
# Weights begin at multiples of a page, so that they can be memory-mapped.
_PAGE = 4096


@dataclass(frozen=True)
class _Outside:
    """The file with the weights of a graph: its name, and offset and bytes of each weight."""

    name: str
    places: Mapping[str, tuple[int, int]]


def structure(model: ir.Model) -> onnx.ModelProto:
    """Return the model without its initializers: nodes, names, types and metadata."""
    # serialize_... instead of to_proto, which takes most of the time to find the object's kind.
    proto = onnx.ModelProto(ir_version=model.ir_version, producer_name=_PRODUCER)
    proto.opset_import.extend(
        onnx.helper.make_opsetid(domain, version)
        for domain, version in model.graph.opset_imports.items()
    )
    onnx.helper.set_model_props(proto, dict(model.metadata_props))
    proto.functions.extend(
        ir.serde.serialize_function(function) for function in model.functions.values()
    )
    graph = proto.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(ir.serde.serialize_node(node) for node in model.graph)
    graph.input.extend(ir.serde.serialize_value(value) for value in model.graph.inputs)
    graph.output.extend(ir.serde.serialize_value(value) for value in model.graph.outputs)
    outputs = {value.name for value in model.graph.outputs}
    graph.value_info.extend(
        ir.serde.serialize_value(value)
        for node in model.graph
        for value in node.outputs
        if value.type is not None and value.name not in outputs
    )
    return proto


def is_large(model: ir.Model) -> bool:
    """Whether the weights of ``model`` are too large for one file."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None) > LARGEST_INSIDE


def _places(model: ir.Model) -> dict[str, tuple[int, int]]:
    """The offset and the bytes of each large weight in the file beside the graph."""
    places, end = {}, 0
    for name, value in model.graph.initializers.items():
        size = tensor_of(value).nbytes
        if size > _SMALLEST_OUTSIDE:
            start = -(-end // _PAGE) * _PAGE
            places[name], end = (start, size), start + size
    return places


def _data_pieces(model: ir.Model, places: Mapping[str, tuple[int, int]]) -> Iterator[bytes]:
    """Yield the file beside the graph in pieces, one weight at a time."""
    end = 0
    for name, (start, size) in places.items():
        yield bytes(start - end)
        yield tensor_of(model.graph.initializers[name]).tobytes()
        end = start + size


def _header_proto(value: ir.Value) -> onnx.TensorProto:
    """An initializer without its values."""
    tensor = tensor_of(value)
    return onnx.TensorProto(
        name=value.name or "", data_type=tensor.dtype.value, dims=tensor.shape.numpy()
    )


def _outside_proto(value: ir.Value, outside: _Outside) -> onnx.TensorProto:
    proto, (start, size) = _header_proto(value), outside.places[value.name or ""]
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", outside.name), ("offset", start), ("length", size)):
        proto.external_data.add(key=key, value=str(text))
    return proto


def weight_proto(value: ir.Value) -> onnx.TensorProto:
    """Return an initializer as protobuf.

    Raises:
        GraphError: it has no data.
    """
    tensor = ir.serde.serialize_tensor(tensor_of(value))
    tensor.name = value.name or ""
    return tensor


def model_pieces(model: ir.Model, outside: _Outside | None = None) -> Iterator[bytes]:
    """Yield ``model`` as consecutive pieces of one protobuf message, at most a weight per piece.

    A concatenation of protobuf messages is parsed as their merge (protobuf.dev, "Encoding").  So
    there is a model for each weight, in one or two pieces, and only one weight at a time is in
    memory twice.  The nodes and the passport come last: a file truncated between two pieces has
    neither and is rejected.  The values of the weights in ``outside`` are left out.
    """
    for name, value in model.graph.initializers.items():
        if outside is not None and name in outside.places:
            weight = onnx.GraphProto(initializer=[_outside_proto(value, outside)])
            yield onnx.ModelProto(graph=weight).SerializeToString()
        elif tensor_of(value).dtype == ir.DataType.STRING:
            weight = onnx.GraphProto(initializer=[weight_proto(value)])
            yield onnx.ModelProto(graph=weight).SerializeToString()
        else:
            # Protobuf would copy the values once for each of the three messages around them.
            values = tensor_of(value).tobytes()
            yield weight_head(_header_proto(value).SerializeToString(), len(values))
            yield values
    yield structure(model).SerializeToString()


def _write(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as stream:
        for piece in pieces:
            stream.write(piece)


def write_model(model: ir.Model, path: Path) -> None:
    """Write ``model`` as one protobuf file; large weights go into a file beside it."""
    outside = None
    if is_large(model):
        outside = _Outside(f"{path.name}.data", _places(model))
        _write(path.with_name(outside.name), _data_pieces(model, outside.places))
    _write(path, model_pieces(model, outside))


@contextmanager
def _weights_beside(model: ir.Model, path: Path) -> Iterator[tuple[_Outside | None, str]]:
    """Write the weights of a large graph beside ``path``; yield their file and its SHA-256.

    The files of earlier weights of ``path`` are removed after the block, the new one if it fails.
    """
    outside, digest = None, ""
    if is_large(model):
        places, hashed = _places(model), hashlib.sha256()
        for piece in _data_pieces(model, places):
            hashed.update(piece)
        digest = hashed.hexdigest()
        outside = _Outside(data_name(path.name, digest), places)
    data = path.with_name(outside.name) if outside else None
    existed = data is not None and data.exists()
    if data is not None and outside is not None:
        with atomic_path(data) as temporary:
            _write(temporary, _data_pieces(model, outside.places))
    try:
        yield outside, digest
    except BaseException:  # also on Ctrl-C; raised again
        if data is not None and not existed:
            data.unlink(missing_ok=True)
        raise
    with file_errors("remove the old weights of", path):
        for old in path.parent.glob(data_name(glob.escape(path.name), "?" * 64)):
            if old != data:
                old.unlink(missing_ok=True)


def save_graph(
    model: ir.Model,
    path: Path,
    passport: Passport,
    check: Callable[[Path], object] = lambda written: None,
) -> GraphArtifact:
    """Write ``model`` with its passport to ``path``; large weights go into a file beside it.

    ``check`` is called with the path of a temporary file.  The file is renamed to ``path`` only if
    it is complete and ``check`` raised nothing.

    Raises:
        FileError: the file cannot be written.
    """
    nodes = len(list(model.graph))
    with _weights_beside(model, path) as (outside, digest):
        weights = {WEIGHTS_ROLE: digest} if outside else {}
        passport = replace(passport, parents=passport.made_from | weights)
        model.metadata_props[PASSPORT_KEY] = to_json(passport).decode()
        with atomic_path(path) as temporary, ThreadPoolExecutor(1) as pool:
            _write(temporary, model_pieces(model, outside))
            # Hashing 1 GB takes a second; the check leaves processors idle while it opens the file.
            hashing = pool.submit(sha256_file, temporary)
            check(temporary)
            sha256 = hashing.result()
    size = path.stat().st_size
    size += path.with_name(outside.name).stat().st_size if outside else 0
    return GraphArtifact(path, sha256, passport, size, nodes, True)


def load_graph(
    path: Path, prepare: Callable[[onnx.ModelProto], onnx.ModelProto] = dense
) -> ir.Model:
    """Load an ONNX file, including external data files in its folder.

    ``prepare`` may change the protobuf model before it is converted, see
    :mod:`exporters.typed_graphs`; external weights have no values at that point.

    Raises:
        FileError: a file cannot be opened.
        GraphError: it is not an ONNX file, or ``prepare`` raised this error.
    """
    data = read_regular(path)
    broken = not_a_graph(path)
    try:
        proto = onnx.ModelProto.FromString(data)
        del data
        refuse_outside(path, _locations(proto))
        model: ir.Model = ir.from_proto(prepare(proto))
    except (DecodeError, ir.serde.SerdeError, ValueError, KeyError, NotImplementedError) as error:
        raise broken from error
    if not model.graph.outputs:
        raise broken
    # External weights are loaded, so that the graph can be saved as a single file.
    with file_errors("read the weights of", path):
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(graph, path.parent)
            for node in graph.all_nodes():
                _load_constants(node)
        return ir.external_data.load_to_model(model)


def _locations(proto: onnx.ModelProto) -> set[str]:
    """The names of the external data files of a model."""
    return {
        ExternalDataInfo(tensor).location
        for tensor in all_tensors(proto)
        if uses_external_data(tensor)
    }


def read_proto(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with the weights of other files inside.

    With more than 2 GB of weights, the result cannot be serialised, but its parts can.

    Raises:
        FileError: a file cannot be read.
        GraphError: it is not an ONNX file, or an external data file is in another folder or too
            short for its weights.
    """
    for file in weight_files(path):
        with open_regular(file):
            pass
    data = read_regular(path)
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(data)
        with file_errors("read the weights of", path):
            for tensor in all_tensors(proto):
                if uses_external_data(tensor):
                    load_external_data_for_tensor(tensor, str(path.parent))
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise not_a_graph(path) from error
    return proto


def _load_constants(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
            continue
        tensor = attribute.as_tensor()
        if isinstance(tensor, ir.ExternalTensor):
            loaded = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
            node.attributes[name] = ir.AttrTensor(name, loaded)
