"""Cuts the demo's graphs in two, to test faults near the end quickly.

The first part, up to the last block or the head, is correct, independent per image, and computed
once per image.  The second part contains the faulty nodes and is run with ONNX Runtime in every
call, so effects of the batch, of random numbers and of repeated calls are not cached.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from graph_edits import captured
from numpy.typing import NDArray
from onnx import ModelProto, helper

from clipdeploy.core.passport import TensorSpec
from clipdeploy.runners.base import Closing, Images, Logits

__all__ = ["CUT", "Body", "CutRunner", "Remembered", "latest_cut", "session"]

# The residual stream before the last block, and its class token after the last one.
CUT, LATE_CUT = "blocks.4/Add_1", "vit/Gather"
_SHAPES: dict[str, list[str | int]] = {CUT: ["batch", 65, 96], LATE_CUT: ["batch", 96]}
_LARGEST_AT_ONCE = 64


def session(model: ModelProto) -> ort.InferenceSession:
    """An ONNX Runtime session on one CPU thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _element_type(model: ModelProto) -> int:
    half = any(w.name == "head.weight/fp16" for w in model.graph.initializer)
    return int(onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT)


def _ancestors(model: ModelProto, cut: str) -> list[onnx.NodeProto]:
    """Return the nodes on which the tensor ``cut`` depends, in graph order."""
    needed, found = {cut}, []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(captured(node))
            found.append(node)
    return found[::-1]


def _part(
    model: ModelProto,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> ModelProto:
    needed = {name for node in nodes for name in captured(node)}
    weights = [w for w in model.graph.initializer if w.name in needed]
    graph = helper.make_graph(nodes, "part", inputs, outputs, weights)
    part = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    part.functions.extend(model.functions)
    return part


def _after(model: ModelProto, cut: str) -> list[onnx.NodeProto]:
    body = [node.SerializeToString() for node in _ancestors(model, cut)]
    return [node for node in model.graph.node if node.SerializeToString() not in body]


def _tail(model: ModelProto, cut: str) -> ModelProto:
    """Return the graph after the cut; inputs are the image and the tensor ``cut``."""
    stream = helper.make_tensor_value_info(cut, _element_type(model), _SHAPES[cut])
    outputs = [onnx.ValueInfoProto(name=each.name) for each in model.graph.output]
    for output in outputs:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return _part(model, _after(model, cut), [*model.graph.input, stream], outputs)


def latest_cut(right: ModelProto, spoilt: ModelProto) -> str:
    """Return the last cut before which two graphs with the same weights there are equal.

    Nothing after it may read what was computed before, but for the tensor itself.
    """
    before = [node.SerializeToString() for node in _ancestors(right, LATE_CUT)]
    same = [node.SerializeToString() for node in _ancestors(spoilt, LATE_CUT)] == before
    after = _after(spoilt, LATE_CUT)
    made = {name for node in _ancestors(spoilt, LATE_CUT) for name in node.output} - {LATE_CUT}
    read = {name for node in after for name in captured(node)}
    return LATE_CUT if same and not made & read else CUT


class Remembered(Closing):
    """Caches a function that treats each image independently."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._known: dict[bytes, NDArray[Any]] = {}

    def __call__(self, images: Images) -> NDArray[Any]:
        """Return the function's rows (B, ...) for images (B, ...)."""
        keys = [image.tobytes() for image in images]
        new = [index for index, key in enumerate(keys) if key not in self._known]
        for at in range(0, len(new), _LARGEST_AT_ONCE):
            part = new[at : at + _LARGEST_AT_ONCE]
            for index, row in zip(part, self._run(images[part]), strict=True):
                self._known[keys[index]] = row
        return np.stack([self._known[key] for key in keys])


class Body(Remembered):
    """A correct graph up to a cut: images (B, 3, 32, 32) -> (B, 65, 96), or (B, 96) at the late."""

    def __init__(self, graph: Path, cut: str = CUT) -> None:
        model, self.cut = onnx.load(graph), cut
        stream = onnx.ValueInfoProto(name=cut)
        stream.type.tensor_type.elem_type = _element_type(model)
        opened = session(_part(model, _ancestors(model, cut), list(model.graph.input), [stream]))
        super().__init__(lambda images: opened.run(None, {"image": images})[0])


class CutRunner(Closing):
    """Runs a correct first part and a faulty second part."""

    batches: tuple[int, int | None] = (1, None)

    def __init__(self, body: Body, spoilt: ModelProto, spec: TensorSpec) -> None:
        self._body, self._tail = body, session(_tail(spoilt, body.cut))
        self._reads_image = "image" in [each.name for each in self._tail.get_inputs()]
        self.name, self.input = "ONNX Runtime (CPU)", spec

    def __call__(self, images: Images) -> Logits:
        """See :class:`clipdeploy.runners.Runner`; any number of images at once."""
        images = np.ascontiguousarray(images)
        feeds = {self._body.cut: self._body(images)}
        if self._reads_image:
            feeds["image"] = images
        logits: Logits = self._tail.run(None, feeds)[0]
        return logits
