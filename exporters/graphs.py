"""Loads and saves complete ONNX files, including their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from clipdeploy.core.files import (
    atomic_path,
    file_errors,
    open_regular,
    read_regular,
    sha256_file,
)
from clipdeploy.core.passport import PASSPORT_KEY, Passport, to_json
from exporters.headers import GraphArtifact, not_a_graph, weight_files
from exporters.initializers import tensor_of
from exporters.nested import all_tensors
from exporters.typed_graphs import dense

__all__ = [
    "load_graph",
    "model_pieces",
    "read_whole",
    "save_graph",
    "structure",
    "weight_proto",
    "write_model",
]

_PRODUCER = "clipdeploy"


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


def weight_proto(value: ir.Value) -> onnx.TensorProto:
    """Return an initializer as protobuf.

    Raises:
        GraphError: it has no data.
    """
    tensor = ir.serde.serialize_tensor(tensor_of(value))
    tensor.name = value.name or ""
    return tensor


def model_pieces(model: ir.Model) -> Iterator[bytes]:
    """Yield ``model`` as consecutive pieces of one protobuf message, one weight per piece.

    A concatenation of protobuf messages is parsed as their merge (protobuf.dev, "Encoding").  So
    each piece is a model with a single weight, and only one weight at a time is in memory twice.
    The nodes and the passport come last: a file truncated between two pieces has neither and is
    rejected.
    """
    for value in model.graph.initializers.values():
        weight = onnx.GraphProto(initializer=[weight_proto(value)])
        yield onnx.ModelProto(graph=weight).SerializeToString()
    yield structure(model).SerializeToString()


def write_model(model: ir.Model, path: Path) -> None:
    """Write ``model`` as one protobuf file."""
    with path.open("wb") as stream:
        for piece in model_pieces(model):
            stream.write(piece)


def save_graph(
    model: ir.Model,
    path: Path,
    passport: Passport,
    check: Callable[[Path], object] = lambda written: None,
) -> GraphArtifact:
    """Write ``model`` with its passport to ``path``.

    ``check`` is called with the path of a temporary file.  The file is renamed to ``path`` only if
    it is complete and ``check`` raised nothing.

    Raises:
        FileError: the file cannot be written.
    """
    model.metadata_props[PASSPORT_KEY] = to_json(passport).decode()
    with atomic_path(path) as temporary:
        write_model(model, temporary)
        check(temporary)
    return GraphArtifact(
        path, sha256_file(path), passport, path.stat().st_size, len(list(model.graph)), True
    )


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


def read_whole(path: Path) -> bytes:
    """Return the bytes of an ONNX file with external weights moved inside.

    Raises:
        FileError: a file cannot be read.
        GraphError: it is not an ONNX file, or an external data file is in another folder or too
            short for its weights.
    """
    files = weight_files(path)
    data = read_regular(path)
    if not files:
        return data
    for file in files:
        with open_regular(file):
            pass
    try:
        proto = onnx.ModelProto.FromString(data)
        with file_errors("read the weights of", path):
            for tensor in all_tensors(proto):
                if uses_external_data(tensor):
                    load_external_data_for_tensor(tensor, str(path.parent))
                    tensor.data_location = onnx.TensorProto.DEFAULT
                    del tensor.external_data[:]
        return bytes(proto.SerializeToString())
    except (DecodeError, EncodeError, ValueError, onnx.checker.ValidationError) as error:
        raise not_a_graph(path) from error


def _load_constants(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
            continue
        tensor = attribute.as_tensor()
        if isinstance(tensor, ir.ExternalTensor):
            loaded = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
            node.attributes[name] = ir.AttrTensor(name, loaded)
