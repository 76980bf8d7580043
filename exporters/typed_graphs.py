"""Infers the type of every tensor of an ONNX model, at any depth.

Local functions are inlined, see :mod:`exporters.functions`, and then types are inferred, including
those in branches.  A declared type (``value_info``) is used only for operators that ONNX does not
define.  A declaration that contradicts the inferred type is an error, as in ONNX Runtime.
"""

from __future__ import annotations

from contextlib import suppress
from math import prod

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    SparseTensorProto,
    TensorProto,
    ValueInfoProto,
    defs,
    helper,
    numpy_helper,
)

from clipdeploy.core.errors import GraphError, first_line
from exporters.functions import ONNX_ERRORS, inlined
from exporters.nested import all_graphs, all_nodes, element_type, inner_graphs

__all__ = ["TYPE_ATTRIBUTES", "dense", "element_types", "flat"]

# Integer attributes that name an element type (ONNX operators, opsets 7 to 26).
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "output_datatype")

# Initializers up to this size in bytes are kept for inference: shapes, axes, element counts.
_SMALL = 1024
_ELEMENT_TYPES = frozenset(TensorProto.DataType.values())


def _densified(sparse: SparseTensorProto) -> TensorProto:
    values = numpy_helper.to_array(sparse.values)
    places = numpy_helper.to_array(sparse.indices)
    shape = tuple(sparse.dims)
    array = np.zeros(prod(shape), values.dtype)
    # Indices are (NNZ,) into the flattened tensor, or (NNZ, rank) (onnx.proto3, SparseTensorProto).
    flat_places = places if places.ndim == 1 else np.ravel_multi_index(tuple(places.T), shape)
    array[flat_places] = values
    return helper.make_tensor(
        sparse.values.name, sparse.values.data_type, shape, array.tobytes(), raw=True
    )


def dense(model: ModelProto) -> ModelProto:
    """Convert the sparse constants of ``model`` to dense ones, in place, as ONNX Runtime does.

    Raises:
        GraphError: a sparse constant is malformed.
    """
    try:
        for graph in inner_graphs(model):
            graph.initializer.extend(_densified(each) for each in graph.sparse_initializer)
            del graph.sparse_initializer[:]
        for node in all_nodes(model):
            for attribute in node.attribute:
                if attribute.type == AttributeProto.SPARSE_TENSOR and not attribute.ref_attr_name:
                    made = _densified(attribute.sparse_tensor)
                    name = "value" if attribute.name == "sparse_value" else attribute.name
                    attribute.CopyFrom(helper.make_attribute(name, made))
    except (ValueError, IndexError, TypeError) as error:
        raise GraphError(f"a sparse constant of the graph is malformed: {error}") from error
    return model


def flat(model: ModelProto) -> ModelProto:
    """Inline local functions, make sparse constants dense and infer the type of every tensor.

    Graphs inside nodes are kept, and their tensors get types as well.  ``model`` may be changed.

    Raises:
        GraphError: a function cannot be inlined, or types contradict each other.
    """
    whole = inlined(dense(model))
    return _with_types(whole)


def _with_types(model: ModelProto) -> ModelProto:
    # Inference serialises the model, so large weights are replaced by inputs of their type.
    light = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.graph.CopyFrom(_without_data(model.graph))
    versions = {each.domain: each.version for each in model.opset_import}
    for graph in all_graphs(light.graph):
        _forget_types(graph, versions)
    try:
        found = onnx.shape_inference.infer_shapes(light, check_type=True, data_prop=True)
    except ONNX_ERRORS as error:
        raise GraphError(
            f"the types of the graph's tensors cannot be inferred: {first_line(error)}",
            hint="check it with onnx.checker.check_model(path, full_check=True)",
        ) from error
    pairs = zip(all_graphs(model.graph), all_graphs(found.graph), strict=True)
    for declared, inferred in list(pairs):
        _take_declared(declared, inferred)
    for field in ("node", "value_info", "output"):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(found.graph, field))
    return model


def _without_data(graph: GraphProto) -> GraphProto:
    """Return the graph with each large initializer replaced by an input."""
    light = GraphProto(name=graph.name, node=graph.node, value_info=graph.value_info)
    light.input.extend(graph.input)
    light.output.extend(graph.output)
    listed = {value.name for value in graph.input}
    for weight in graph.initializer:
        if weight.ByteSize() <= _SMALL and not _lacks_values(weight):
            light.initializer.append(weight)
        elif weight.name not in listed:
            light.input.append(
                helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
            )
    return light


def _lacks_values(weight: TensorProto) -> bool:
    """Return whether the values of an initializer were skipped or are in an external file."""
    if weight.data_location == TensorProto.EXTERNAL:
        return True
    data = (weight.raw_data, weight.float_data, weight.int32_data, weight.int64_data)
    more = (weight.double_data, weight.uint64_data, weight.string_data)
    return prod(weight.dims) > 0 and not any(len(field) for field in (*data, *more))


def _forget_types(graph: GraphProto, versions: dict[str, int]) -> None:
    """Remove the declared types of outputs of ONNX's operators, which are inferred instead."""
    known = set()
    for node in graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = versions.get(domain, versions.get("ai.onnx", 0) if not domain else 0)
        if version and defs.has(node.op_type, version, domain):
            known.update(node.output)
    kept = [value for value in graph.value_info if value.name not in known]
    graph.ClearField("value_info")
    graph.value_info.extend(kept)
    for value in graph.output:
        if value.name in known:
            value.ClearField("type")


def _take_declared(declared: GraphProto, inferred: GraphProto) -> None:
    """Copy types that only ``declared`` has to ``inferred``.

    Raises:
        GraphError: the two have different types for one tensor.
    """
    outputs = {value.name: value for value in inferred.output}
    known = {value.name: value for value in inferred.value_info}
    # A declared output is copied for its shape, which inference may not find.
    for value in (*declared.value_info, *declared.output):
        expected = element_type(value.type)
        existing = outputs.get(value.name, known.get(value.name))
        found = element_type(existing.type) if existing is not None else TensorProto.UNDEFINED
        if expected and found and expected != found:
            raise GraphError(
                f"{value.name} is declared {_type_name(expected)}, but its operator gives "
                f"{_type_name(found)}",
                hint="remove the graph's value_info, or export it again",
            )
        if not expected:
            continue
        if value.name in outputs:
            outputs[value.name].CopyFrom(value)
        elif existing is None:
            inferred.value_info.append(value)
        elif not found:
            existing.CopyFrom(value)


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def element_types(model: ModelProto) -> set[int]:
    """Return the ONNX element types of all tensors of ``model``, at any depth.

    Declared types, inferred types and types in operator attributes are included, so the result may
    contain a type that no tensor has.

    Raises:
        GraphError: a local function cannot be inlined.
    """
    whole = ModelProto()
    whole.CopyFrom(inlined(model, any_opset=True))
    found = _declared_types(whole.graph)
    # Contradicting types are an error only when the graph is run.  Every type of a graph is written
    # down somewhere in it, and those were collected above.
    with suppress(GraphError):
        found |= _declared_types(_with_types(dense(whole)).graph)
    return found - {TensorProto.UNDEFINED}


def _declared_types(graph: GraphProto) -> set[int]:
    found: set[int] = set()
    for each in all_graphs(graph):
        typed: list[ValueInfoProto] = [*each.input, *each.output, *each.value_info]
        found |= {element_type(value.type) for value in typed}
        found |= {weight.data_type for weight in each.initializer}
        found |= {sparse.values.data_type for sparse in each.sparse_initializer}
        for node in each.node:
            for attribute in node.attribute:
                found |= _attribute_types(attribute)
    return found


def _attribute_types(attribute: AttributeProto) -> set[int]:
    if attribute.type == AttributeProto.INT:
        # Custom operators use further attribute names, such as data_type and compute_type.
        named = attribute.name in TYPE_ATTRIBUTES or attribute.name.endswith("type")
        return {attribute.i} & _ELEMENT_TYPES if named else set()
    tensors = [attribute.t] if attribute.HasField("t") else []
    found = {tensor.data_type for tensor in (*tensors, *attribute.tensors)}
    if attribute.HasField("sparse_tensor"):
        found.add(attribute.sparse_tensor.values.data_type)
    if attribute.HasField("tp"):
        found.add(element_type(attribute.tp))
    return found
