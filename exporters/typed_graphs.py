"""An ONNX model in which every tensor has its type, at any depth.

Calls of local functions are replaced by their nodes, see :mod:`exporters.functions`, and then the
types of all tensors are inferred, branch by branch.  A declared type (``value_info``) counts only
where an operator is unknown to ONNX; a declaration that contradicts the inferred type is refused,
as ONNX Runtime refuses it.
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

# Initializers up to so many bytes stay for inference: shapes, axes, numbers of elements.
_SMALL = 1024
_KINDS = frozenset(TensorProto.DataType.values())


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
    """``model``, its sparse constants made dense in place, as ONNX Runtime does on loading.

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
    """``model`` without local functions and sparse constants, and with the type of every tensor.

    Graphs inside nodes stay where they are; their tensors have types as well.  ``model`` may be
    changed.

    Raises:
        GraphError: functions that cannot be inlined, types that contradict each other.
    """
    whole = inlined(dense(model))
    return _with_types(whole)


def _with_types(model: ModelProto) -> ModelProto:
    # Inference serialises the model: large weights only pass their types.
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
    """The graph with every large initializer as an input."""
    light = GraphProto(name=graph.name, node=graph.node, value_info=graph.value_info)
    light.input.extend(graph.input)
    light.output.extend(graph.output)
    listed = {value.name for value in graph.input}
    for weight in graph.initializer:
        if weight.ByteSize() <= _SMALL and not _is_lean(weight):
            light.initializer.append(weight)
        elif weight.name not in listed:
            light.input.append(
                helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims))
            )
    return light


def _is_lean(weight: TensorProto) -> bool:
    """Whether an initializer has no values here: a skeleton's, or one in a file beside."""
    if weight.data_location == TensorProto.EXTERNAL:
        return True
    data = (weight.raw_data, weight.float_data, weight.int32_data, weight.int64_data)
    more = (weight.double_data, weight.uint64_data, weight.string_data)
    return prod(weight.dims) > 0 and not any(len(field) for field in (*data, *more))


def _forget_types(graph: GraphProto, versions: dict[str, int]) -> None:
    """Remove the declared types of what ONNX's own operators give: they are inferred."""
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
    """Give ``inferred`` the types that only ``declared`` has.

    Raises:
        GraphError: the two say different types of one tensor.
    """
    outputs = {value.name: value for value in inferred.output}
    known = {value.name: value for value in inferred.value_info}
    # The shape of an output that somebody declared is more than what is inferred.
    for value in (*declared.value_info, *declared.output):
        said = element_type(value.type)
        there = outputs.get(value.name, known.get(value.name))
        found = element_type(there.type) if there is not None else TensorProto.UNDEFINED
        if said and found and said != found:
            raise GraphError(
                f"{value.name} is declared {_type_name(said)}, but its operator gives "
                f"{_type_name(found)}",
                hint="remove the graph's value_info, or export it again",
            )
        if not said:
            continue
        if value.name in outputs:
            outputs[value.name].CopyFrom(value)
        elif there is None:
            inferred.value_info.append(value)
        elif not found:
            there.CopyFrom(value)


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()


def element_types(model: ModelProto) -> set[int]:
    """The ONNX element types of all tensors of ``model``, at any depth.

    What is declared and what is inferred both count, and what operators' attributes name: a type
    that occurs is among them, though perhaps another too.

    Raises:
        GraphError: local functions that cannot be read.
    """
    whole = ModelProto()
    whole.CopyFrom(inlined(model, any_opset=True))
    found = _declared_types(whole.graph)
    # Types that contradict each other are for those to refuse who run the graph.  No type comes
    # into a graph that is not written down somewhere, and what is written down is here already.
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
        # Operators beyond ONNX's own have further names for it: data_type, compute_type.
        named = attribute.name in TYPE_ATTRIBUTES or attribute.name.endswith("type")
        return {attribute.i} & _KINDS if named else set()
    tensors = [attribute.t] if attribute.HasField("t") else []
    found = {tensor.data_type for tensor in (*tensors, *attribute.tensors)}
    if attribute.HasField("sparse_tensor"):
        found.add(attribute.sparse_tensor.values.data_type)
    if attribute.HasField("tp"):
        found.add(element_type(attribute.tp))
    return found
