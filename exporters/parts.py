"""Cuts a part out of a graph, as a graph of its own that runs by itself.

A long network can then be run one part after the other, with only the tensors between two parts in
memory, and each part may be changed and run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError
from exporters.graphs import weight_proto
from exporters.initializers import drop_weights
from exporters.session import OnnxSession
from exporters.tapped import free_batch, serialised

__all__ = ["cut_out", "run_part"]


@contextmanager
def cut_out(model: ir.Model, start: ir.Value | None, end: ir.Value) -> Iterator[ir.Model]:
    """Copy what computes ``end`` from ``start``, or from the graph's inputs if that is None.

    The copy has the names of ``model`` and runs any batch.  It loses its weights behind the block.

    Raises:
        GraphError: ``end`` also depends on other tensors than ``start``.
    """
    part = _copied(model, start, end)
    try:
        yield part
    finally:
        drop_weights(part.graph)


def _copied(model: ir.Model, start: ir.Value | None, end: ir.Value) -> ir.Model:
    nodes, constants = _between(start, end)
    inputs = list(model.graph.inputs) if start is None else [start]
    graph = onnx.GraphProto(name=f"to {end.name}")
    kept = (node for node in model.graph if node in nodes)
    graph.node.extend(ir.serde.serialize_node(node) for node in kept)
    graph.initializer.extend(weight_proto(value) for value in constants)
    graph.input.extend(ir.serde.serialize_value(value) for value in inputs)
    graph.output.append(ir.serde.serialize_value(end))
    graph.value_info.extend(
        ir.serde.serialize_value(value)
        for node in nodes
        for value in node.outputs
        if value is not end and value.type is not None
    )
    proto = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.append(onnx.helper.make_opsetid(domain, version))
    part: ir.Model = ir.from_proto(proto)
    free_batch(part)
    return part


def _between(
    start: ir.Value | None, end: ir.Value
) -> tuple[dict[ir.Node, None], dict[ir.Value, None]]:
    """The nodes from ``start`` to ``end``, and the constants that they read."""
    nodes: dict[ir.Node, None] = {}
    constants: dict[ir.Value, None] = {}
    left = [end]
    while left:
        value = left.pop()
        node = value.producer()
        if value is start or node in nodes:
            continue
        if value.is_initializer():
            constants[value] = None
        elif node is not None:
            nodes[node] = None
            left.extend(each for each in node.inputs if each is not None)
        elif start is not None:
            raise GraphError(
                f"{end.name} depends on {value.name} and not only on {start.name}",
                hint="use an FP32 graph that `clipdeploy export` wrote",
            )
    return nodes, constants


def run_part(
    part: ir.Model,
    outputs: list[ir.Value],
    inputs: Iterable[NDArray[Any]],
    *,
    threads: int = 0,
) -> Iterator[list[NDArray[np.float32]]]:
    """Run ``part`` as far as ``outputs``, float32 tensors of it, on each of ``inputs`` (B, ...).

    Yields the outputs of each input, float32 (B, ...) in the order of ``outputs``.  Q/DQ pairs are
    computed as they are written, without 8-bit kernels.
    """
    declared = list(part.graph.outputs)
    part.graph.outputs[:] = outputs
    try:
        session = OnnxSession(serialised(part), name="part", threads=threads, fp8=True)
    finally:
        part.graph.outputs[:] = declared
    for each in inputs:
        yield session.run(each)
