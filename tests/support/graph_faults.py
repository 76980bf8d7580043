"""Typical faults of exporters, converters and people in a ViT's graph.

Each changes the demo model's graph in place; the table's name gives the precision of the graph.
Node names are those of :mod:`clipdeploy.models.vit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graph_edits import Edit, add_weight, read, redirect, write
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

__all__ = [
    "FP16_FAULTS",
    "FP32_FAULTS",
    "INT8_FAULTS",
    "RATIO_FAULTS",
    "REGRESSED",
    "Edit",
    "read",
    "ruin",
    "turn_answers",
    "write",
]

_HEADS = 6


def ruin(graph: Path, edit: Edit) -> None:
    """Apply the fault to a graph file; its passport is kept."""
    model = onnx.load(graph)
    edit(model)
    onnx.save(model, graph)


def turn_answers(model: ModelProto) -> None:
    """Shift the classes by one, in a graph of any precision."""
    weights = [w.name for w in model.graph.initializer if w.name.startswith("head.")]
    for name in weights:
        # (inputs, classes), and (classes,)
        write(model, name, np.roll(read(model, name), 1, axis=-1))


def _change(name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Edit:
    return lambda model: write(model, name, change(read(model, name)))


def _node(model: ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def _insert_after(model: ModelProto, value: str, steps: Sequence[NodeProto]) -> None:
    """Insert ``steps``, whose last node computes ``VALUE/changed``, after the tensor ``value``."""
    redirect(model, value, f"{value}/changed")
    at = next(i for i, node in enumerate(model.graph.node) if value in node.output)
    for step in reversed(steps):
        model.graph.node.insert(at + 1, step)


def _attribute(op_type: str, key: str, value: object) -> Edit:
    def change(model: ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == op_type:
                kept = [each for each in node.attribute if each.name != key]
                del node.attribute[:]
                node.attribute.extend([*kept, helper.make_attribute(key, value)])

    return change


def _swap_columns(array: NDArray[Any]) -> NDArray[Any]:
    array[..., [3, 7]] = array[..., [7, 3]]
    return array


def _transpose_grid(position: NDArray[Any]) -> NDArray[Any]:
    side, width = 8, position.shape[-1]
    grid = position[:, 1:].reshape(1, side, side, width).transpose(0, 2, 1, 3)
    return np.concatenate([position[:, :1], grid.reshape(1, side * side, width)], axis=1)


def _forget_class_token(position: NDArray[Any]) -> NDArray[Any]:
    position[:, 0] = 0
    return position


def _qkv(block: int, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Edit:
    """Change the qkv weights and biases as (..., 3, heads, width of a head)."""

    def edit(model: ModelProto) -> None:
        for kind in ("weight", "bias"):
            name = f"blocks.{block}.attn.qkv.{kind}"
            array = read(model, name)
            split = array.reshape(*array.shape[:-1], 3, _HEADS, -1)
            write(model, name, change(split).reshape(array.shape))

    return edit


def _double_one_head(qkv: NDArray[Any]) -> NDArray[Any]:
    qkv[..., 0, 2, :] *= 2
    return qkv


def _skip_block(model: ModelProto) -> None:
    redirect(model, "blocks.3/Add_1", "blocks.2/Add_1")


def _skip_norm_pre(model: ModelProto) -> None:
    redirect(model, "norm_pre", "vit/Add")


def _drop_residual(model: ModelProto) -> None:
    redirect(model, "blocks.3/Add", "blocks.3.attn.proj")


def _token_of_a_neighbour(model: ModelProto) -> None:
    ends = (("starts", [-1]), ("ends", [np.iinfo(np.int64).min]), ("axes", [0]), ("steps", [-1]))
    names = [add_weight(model, f"turn/{key}", np.asarray(value)) for key, value in ends]
    turn = helper.make_node("Slice", ["vit/Gather", *names], ["vit/Gather/changed"], name="turn")
    _insert_after(model, "vit/Gather", [turn])


def _both_head(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Edit:
    def edit(model: ModelProto) -> None:
        for kind in ("weight", "bias"):
            write(model, f"head.{kind}", change(read(model, f"head.{kind}")))

    return edit


def _swap_rows(array: NDArray[Any]) -> NDArray[Any]:
    array[[4, 9]] = array[[9, 4]]
    return array


def _four_bits(model: ModelProto) -> None:
    for weight in list(model.graph.initializer):
        if weight.name.startswith("blocks.") and len(weight.dims) == 2:
            array = read(model, weight.name)
            step = np.abs(array).max(axis=0) / 7
            write(model, weight.name, np.round(array / step) * step)


def _flip_bit(array: NDArray[Any]) -> NDArray[Any]:
    # The third lowest bit of the exponent: the weight is multiplied or divided by 16.
    array.reshape(-1).view(np.uint32)[1000] ^= 1 << 25
    return array


def _quick_gelu(model: ModelProto) -> None:
    factor = add_weight(model, "quick/factor", np.float32(1.702).reshape(()))
    for node in [node for node in model.graph.node if node.op_type == "Gelu"]:
        source, result = node.input[0], node.output[0]
        steps = [
            helper.make_node("Mul", [source, factor], [f"{result}/scaled"]),
            helper.make_node("Sigmoid", [f"{result}/scaled"], [f"{result}/gate"]),
            helper.make_node("Mul", [source, f"{result}/gate"], [result]),
        ]
        at = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        for step in reversed(steps):
            model.graph.node.insert(at, step)


def _relu(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type = "Relu"
            del node.attribute[:]


def _there_and_back(value: str, factor: float) -> Edit:
    """Multiply and divide by ``factor``: no effect in float32, a large one in float16."""

    def edit(model: ModelProto) -> None:
        names = [f"{value}/far", f"{value}/changed"]
        by = add_weight(model, f"{value}/by", np.float16(factor).reshape(()))
        far = helper.make_node("Mul", [value, by], [names[0]], name=names[0])
        back = helper.make_node("Div", [names[0], by], [names[1]], name=names[1])
        _insert_after(model, value, [far, back])
        half = onnx.TensorProto.FLOAT16
        model.graph.value_info.extend(
            helper.make_tensor_value_info(name, half, ["batch", 65, 96]) for name in names
        )

    return edit


def _one_side(
    model: ModelProto, suffix: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    """Change a constant of DequantizeLinear, but not of QuantizeLinear."""
    array = read(model, f"blocks.2.mlp.fc1.{suffix}")
    name = add_weight(model, f"other/{suffix}", change(array).astype(array.dtype).reshape(()))
    dequantise = _node(model, "blocks.2.mlp.fc1/DQ")
    dequantise.input[1 if "scale" in suffix else 2] = name


def _all_activations(factor: float) -> Edit:
    def edit(model: ModelProto) -> None:
        for weight in list(model.graph.initializer):
            if weight.name.endswith(".input_scale/fp16"):
                write(model, weight.name, read(model, weight.name) * factor)

    return edit


def _zero(array: NDArray[Any]) -> NDArray[Any]:
    return np.zeros_like(array)


# Expected finding: a proven drop, or an SQNR below this many dB, where the correct graph has 129
# (fp32), 62 (fp16) or 41 (int8).
REGRESSED = float("-inf")

FP32_FAULTS: dict[str, tuple[Edit, float]] = {
    "a weight channel swapped": (_change("blocks.2.mlp.fc1.weight", _swap_columns), 44),
    "a bias dropped": (_change("blocks.1.mlp.fc1.bias", _zero), 42),
    "the head's bias dropped": (_change("head.bias", _zero), 29),
    "a weight transposed": (_change("blocks.2.attn.proj.weight", np.transpose), 14),
    "the position grid transposed": (_change("position", _transpose_grid), REGRESSED),
    "the class token forgotten": (_change("position", _forget_class_token), REGRESSED),
    "q and v exchanged": (_qkv(0, lambda qkv: qkv[..., [2, 1, 0], :, :]), REGRESSED),
    "q and k exchanged": (_qkv(0, lambda qkv: qkv[..., [1, 0, 2], :, :]), REGRESSED),
    "one head's scale doubled": (_qkv(1, _double_one_head), 29),
    "heads in another order than proj's": (_qkv(2, lambda qkv: np.roll(qkv, 1, axis=-2)), 14),
    "softmax over the queries": (_attribute("Softmax", "axis", -2), REGRESSED),
    "a block skipped": (_skip_block, 13),
    "norm_pre skipped": (_skip_norm_pre, 12),
    "a residual dropped": (_drop_residual, REGRESSED),
    "the class token of another image": (_token_of_a_neighbour, REGRESSED),
    "the head's rows rolled": (_both_head(lambda array: np.roll(array, 1, axis=0)), REGRESSED),
    "two classes exchanged": (_both_head(_swap_rows), REGRESSED),
    "the logits doubled": (_both_head(lambda array: array * 2), 1),
    "every logit too large by 1": (_change("head.bias", lambda array: array + 1), 8),
    "weights rounded to 4 bits": (_four_bits, 24),
    "one bit of one weight flipped": (_change("blocks.0.mlp.fc2.weight", _flip_bit), 52),
    "tanh for erf in GELU": (_attribute("Gelu", "approximate", "tanh"), 83),
    "QuickGELU": (_quick_gelu, 45),
    "ReLU for GELU": (_relu, 24),
    "LayerNorm's eps 1e-6": (_attribute("LayerNormalization", "epsilon", 1e-6), 99),
    "LayerNorm's eps 1e-3": (_attribute("LayerNormalization", "epsilon", 1e-3), 58),
    "red and blue exchanged in the patch weights": (
        _change("patch_embed.weight", lambda weight: weight[:, ::-1]),
        REGRESSED,
    ),
    "patches transposed": (
        _change("patch_embed.weight", lambda weight: weight.transpose(0, 1, 3, 2)),
        REGRESSED,
    ),
}

FP16_FAULTS: dict[str, tuple[Edit, float]] = {
    "overflow in a residual": (_there_and_back("blocks.2/Add_1", 2.0**14), REGRESSED),
    "underflow in a residual": (_there_and_back("blocks.2/Add_1", 2.0**-22), 50),
}

_FC1 = "blocks.2.mlp.fc1"
# In the ratio form of the weight scales; all others are in the channel form.
RATIO_FAULTS: dict[str, tuple[Edit, float]] = {
    "ratios of the weight scales rolled by a channel": (
        _change(f"{_FC1}.weight_ratio/fp16", lambda ratio: np.roll(ratio, 1)),
        38,
    ),
    "no ratios of the weight scales": (_change(f"{_FC1}.weight_ratio/fp16", np.ones_like), 38),
    "the common weight scale doubled": (
        _change(f"{_FC1}.weight/scale/fp16", lambda scale: scale * 2),
        30,
    ),
}
INT8_FAULTS: dict[str, tuple[Edit, float]] = {
    "an activation scale halved": (_change(f"{_FC1}.input_scale/fp16", lambda s: s / 2), 36),
    "all activation scales doubled": (_all_activations(2), 38),
    "an activation scale doubled on one side": (
        lambda model: _one_side(model, "input_scale/fp16", lambda scale: scale * 2),
        22,
    ),
    "a zero point of 8 on one side": (
        lambda model: _one_side(model, "input_zero_point", lambda zero: zero + 8),
        38,
    ),
    "a weight scale doubled": (_change(f"{_FC1}.weight/scale/fp16", lambda s: s * 2), 30),
    "weight scales rolled by a channel": (
        _change(f"{_FC1}.weight/scale/fp16", lambda scale: np.roll(scale, 1)),
        32,
    ),
    "a shift forgotten": (_change("blocks.2.mlp.fc2.input_shift/fp16", _zero), 11),
    "int8 weights wrapped around": (
        _change("blocks.2.attn.proj.weight/int8", lambda w: w.astype(np.int16) * 2),
        15,
    ),
}
