"""Add outputs to a graph, to observe tensors inside it.

A tap is one or more nodes that read a tensor and reduce it, such as Abs and ReduceMax, so that
ONNX Runtime copies out the result instead of a whole activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import onnx_ir as ir

from clipdeploy.core.files import file_errors
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.passport import BATCH_AXIS
from exporters.graphs import is_large, model_pieces, write_model
from exporters.session import OnnxSession

__all__ = ["add_tap", "free_batch", "open_model", "serialised"]


def add_tap(model: ir.Model, name: str, nodes: Sequence[ir.Node]) -> None:
    """Add ``nodes`` to the graph; the last one's result becomes the float32 output ``name``.

    Each node has one output; ``nodes`` are in topological order.  The first one's first input is
    the observed tensor; they are inserted right behind the node that computes it.  If ONNX Runtime
    runs the nodes in this order (``in_order`` of :class:`exporters.session.OnnxSession`), it can
    free the tensor as early as without the tap.
    """
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"inside/{index}/{name}"
    last = nodes[-1].outputs[0]
    last.name = name
    last.type = ir.TensorType(ir.DataType.FLOAT)
    observed = nodes[0].inputs[0]
    producer = None if observed is None else observed.producer()
    if producer is None:
        model.graph.extend(nodes)
    else:
        model.graph.insert_after(producer, nodes)
    model.graph.outputs.append(last)


def free_batch(model: ir.Model) -> None:
    """Let a graph that was exported for a fixed batch run any batch.

    Its nodes do not depend on the batch size, only the declared shapes do: those of the input and
    of the outputs become symbolic, all others are removed.
    """
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape:
            value.shape = ir.Shape([BATCH_AXIS, *value.shape[1:]])


def open_model(model: ir.Model, *, name: str, threads: int = 0) -> OnnxSession:
    """Open ``model`` in ONNX Runtime, through a temporary file if it is too large for a message.

    Raises:
        GraphError: ONNX Runtime cannot load the graph.
        FileError: the file cannot be written.
    """
    if not is_large(model):
        return OnnxSession(serialised(model), name=name, threads=threads)
    with scratch_folder() as folder:
        path = folder / "graph.onnx"
        with file_errors("write", path):
            write_model(model, path)
        return OnnxSession(path, threads=threads)


def serialised(model: ir.Model) -> bytes:
    """``model`` as one protobuf message, as ONNX Runtime loads it."""
    # One growing buffer: a list of pieces and their join would hold the weights twice.
    stream = BytesIO()
    for piece in model_pieces(model):
        stream.write(piece)
    return stream.getvalue()
