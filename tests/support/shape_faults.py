"""Graphs that return a wrong number of rows or classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from graph_edits import Edit, Steps
from onnx import ModelProto, TensorProto, helper

__all__ = ["SHAPE_FAULTS"]


def _on_logits(change: Callable[[Steps], str]) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, "logits")
        steps.finish(change(steps))
        # The declared shape would be wrong, which ONNX Runtime rejects.
        model.graph.output[0].type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]

    return edit


def _whole(steps: Steps, *values: int) -> str:
    return steps.const(values, np.int64)


def _size(steps: Steps) -> str:
    return steps.op("Shape", steps.value, start=0, end=1)


def _cut(axis: int, end: int) -> Callable[[Steps], str]:
    def change(steps: Steps) -> str:
        ends = (_whole(steps, 0), _whole(steps, end), _whole(steps, axis))
        return steps.op("Slice", steps.value, *ends)

    return change


def _twice(axis: int) -> Callable[[Steps], str]:
    return lambda steps: steps.op("Concat", steps.value, steps.value, axis=axis)


def _filled_up(steps: Steps) -> str:
    """Append rows of zeros up to the next multiple of 8."""
    rest = steps.op("Mod", steps.op("Neg", _size(steps)), _whole(steps, 8))
    pads = steps.op("Concat", _whole(steps, 0, 0), rest, _whole(steps, 0), axis=0)
    return steps.op("Pad", steps.value, pads)


def _sixteen(steps: Steps) -> str:
    """Return sixteen rows for any batch, as if the batch had been fixed at export."""
    pads = steps.op("Pad", steps.value, _whole(steps, 0, 0, 16, 0))
    return steps.op("Slice", pads, _whole(steps, 0), _whole(steps, 16), _whole(steps, 0))


def _one_more_column(steps: Steps) -> str:
    return steps.op("Pad", steps.value, _whole(steps, 0, 0, 0, 1))


def _branches(limit: int, taken: str) -> Callable[[Steps], str]:
    """Repeat the rows, or drop the last one, above ``limit`` images."""

    def change(steps: Steps) -> str:
        if taken == "twice":
            inner = [helper.make_node("Concat", [steps.value, steps.value], ["wrong"], axis=0)]
        else:
            ends = [_whole(steps, number) for number in (0, -1, 0)]
            inner = [helper.make_node("Slice", [steps.value, *ends], ["wrong"])]
        same = [helper.make_node("Identity", [steps.value], ["right"])]
        graphs = []
        for nodes, output in ((inner, "wrong"), (same, "right")):
            info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
            graphs.append(helper.make_graph(nodes, output, [], [info]))
        large = steps.op("Squeeze", steps.op("Greater", _size(steps), _whole(steps, limit)))
        return steps.op("If", large, then_branch=graphs[0], else_branch=graphs[1])

    return change


SHAPE_FAULTS: dict[str, Edit] = {
    "every row twice": _on_logits(_twice(0)),
    "rows filled up to a multiple of 8": _on_logits(_filled_up),
    "always 16 rows": _on_logits(_sixteen),
    "the last row lost": _on_logits(_cut(0, -1)),
    "one row for all images": _on_logits(_cut(0, 1)),
    "rows twice above 16 images": _on_logits(_branches(16, "twice")),
    "a row lost above 24 images": _on_logits(_branches(24, "lost")),
    "a class lost": _on_logits(_cut(1, -1)),
    "a class more": _on_logits(_one_more_column),
    "every class twice": _on_logits(_twice(1)),
    "rows for classes": _on_logits(lambda steps: steps.op("Transpose", steps.value, perm=[1, 0])),
    "all in one row": _on_logits(
        lambda steps: steps.op("Reshape", steps.value, _whole(steps, 1, -1))
    ),
    "an axis more": _on_logits(lambda steps: steps.op("Unsqueeze", steps.value, _whole(steps, 2))),
    "an axis less": _on_logits(lambda steps: steps.op("Reshape", steps.value, _whole(steps, -1))),
    "no batch axis for one image": _on_logits(
        lambda steps: steps.op("Reshape", steps.value, _squeezed_shape(steps))
    ),
}


def _squeezed_shape(steps: Steps) -> str:
    """Remove the first axis if its size is 1."""
    one = steps.op("Equal", _size(steps), _whole(steps, 1))
    shape = steps.op("Shape", steps.value)
    begin = steps.op("Cast", one, to=TensorProto.INT64)
    return steps.op("Slice", shape, begin, _whole(steps, 2), _whole(steps, 0))
