"""Faults in the float16 and the INT8 graph of the demo model.

Those of :data:`graph_faults.FP32_FAULTS` that are possible in any precision come first, then faults
of conversions to float16 and INT8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from graph_edits import Edit, Steps, read, write
from graph_faults import FP32_FAULTS, REGRESSED
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

__all__ = ["MORE_FP16_FAULTS", "MORE_INT8_FAULTS"]

Array = NDArray[Any]
_FC1, _PROJ = "blocks.2.mlp.fc1", "blocks.2.attn.proj"

# Names in FP32_FAULTS of faults that are possible in any precision.
_ANY_PRECISION = (
    "the position grid transposed",
    "the class token forgotten",
    "softmax over the queries",
    "a block skipped",
    "two classes exchanged",
    "the logits doubled",
    "the head's bias dropped",
    "patches transposed",
)
_FLOAT_WEIGHTS = ("q and v exchanged", "weights rounded to 4 bits")


def _change(name: str, change: Callable[[Array], Array]) -> Edit:
    return lambda model: write(model, name, change(read(model, name)))


def _on(value: str, change: Callable[[Steps], str]) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        steps.finish(change(steps))

    return edit


def _half(steps: Steps, number: float) -> str:
    return steps.const(number, np.float16)


def _times_and_over(number: float) -> Callable[[Steps], str]:
    def change(steps: Steps) -> str:
        by = _half(steps, number)
        return steps.op("Div", steps.op("Mul", steps.value, by), by)

    return change


def _plus_and_minus(number: float) -> Callable[[Steps], str]:
    def change(steps: Steps) -> str:
        by = _half(steps, number)
        return steps.op("Sub", steps.op("Add", steps.value, by), by)

    return change


def _squared_and_rooted(steps: Steps) -> str:
    """Compute the magnitude from 300 times its square, which overflows float16."""
    scaled = steps.op("Mul", steps.value, _half(steps, 300.0))
    length = steps.op("Sqrt", steps.op("Mul", scaled, scaled))
    signed = steps.op("Mul", length, steps.op("Sign", steps.value))
    return steps.op("Div", signed, _half(steps, 300.0))


def _through(kind: int) -> Callable[[Steps], str]:
    def change(steps: Steps) -> str:
        return steps.op("CastLike", steps.op("Cast", steps.value, to=kind), steps.value)

    return change


def _to_bfloat16(array: Array) -> Array:
    wide = np.ascontiguousarray(array, np.float32)
    return (wide.view(np.uint32) & 0xFFFF0000).view(np.float32)


def _weights_in_bfloat16(model: ModelProto) -> None:
    for weight in list(model.graph.initializer):
        if weight.name.startswith("blocks.") and weight.data_type == TensorProto.FLOAT16:
            write(model, weight.name, _to_bfloat16(read(model, weight.name)))


def _residuals_in_bfloat16(model: ModelProto) -> None:
    for block in range(5):
        _on(f"blocks.{block}/Add_1", _through(TensorProto.BFLOAT16))(model)


def _in_function(model: ModelProto) -> None:
    """Overflow in a local function, which a checker may skip."""
    by = helper.make_node("Constant", [], ["by"], value=_scalar(2.0**14))
    nodes = [by, helper.make_node("Mul", ["x", "by"], ["far"])]
    nodes.append(helper.make_node("Div", ["far", "by"], ["y"]))
    function = helper.make_function(
        "tests", "FarAndBack", ["x"], ["y"], nodes, [helper.make_opsetid("", 20)]
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("tests", 1))
    _on("blocks.2/Add_1", lambda steps: steps.op("FarAndBack", steps.value, domain="tests"))(model)


def _in_branch(model: ModelProto) -> None:
    """Overflow in a branch of an If that is always taken."""
    steps = Steps(model, "blocks.2/Add_1")
    graphs = {}
    for key in ("then_branch", "else_branch"):
        nodes = [
            helper.make_node("Constant", [], [f"{key}/by"], value=_scalar(2.0**14)),
            helper.make_node("Mul", [steps.value, f"{key}/by"], [f"{key}/far"]),
            helper.make_node("Div", [f"{key}/far", f"{key}/by"], [f"{key}/near"]),
        ]
        info = helper.make_tensor_value_info(f"{key}/near", TensorProto.FLOAT16, ["batch", 65, 96])
        graphs[key] = helper.make_graph(nodes, key, [], [info])
    size = steps.op("Shape", "image", start=0, end=1)
    taken = steps.op("Squeeze", steps.op("Greater", size, steps.const([0], np.int64)))
    steps.finish(steps.op("If", taken, **graphs))


def _scalar(number: float) -> TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(number, np.float16))


def _both(names: tuple[str, ...], precision: str) -> dict[str, tuple[Edit, float]]:
    return {f"{precision}: {name}": FP32_FAULTS[name] for name in names}


_SQUARED = _on("blocks.1/Add", _squared_and_rooted)
_LAST_BITS = _on("blocks.2/Add_1", _plus_and_minus(2048))
MORE_FP16_FAULTS: dict[str, tuple[Edit, float]] = {
    **_both((*_ANY_PRECISION, *_FLOAT_WEIGHTS), "fp16"),
    "an overflow in a local function": (_in_function, REGRESSED),
    "an overflow in a branch": (_in_branch, REGRESSED),
    "an overflow in the square of a residual": (
        _on("blocks.1/Add", _squared_and_rooted),
        REGRESSED,
    ),
    "an overflow of the attention scores": (
        _on("blocks.1.attn/MatMul", _times_and_over(2.0**15)),
        REGRESSED,
    ),
    "an underflow of the attention": (_on("blocks.1.attn/Softmax", _times_and_over(2.0**-20)), 50),
    "a residual 2048 too large for its last bits": (
        _on("blocks.2/Add_1", _plus_and_minus(2048)),
        40,
    ),
    "residuals in bfloat16": (_residuals_in_bfloat16, 57),
    "weights in bfloat16": (_weights_in_bfloat16, 57),
    "a residual in whole numbers": (_on("blocks.2/Add_1", _through(TensorProto.INT32)), 30),
}


def _both_sides(suffix: str, change: Callable[[Array], Array], linear: str = _FC1) -> Edit:
    return _change(f"{linear}.{suffix}", change)


def _all_scales(factor: float) -> Edit:
    def edit(model: ModelProto) -> None:
        for weight in list(model.graph.initializer):
            if weight.name.endswith(".input_scale/fp16"):
                write(model, weight.name, read(model, weight.name) * factor)

    return edit


def _one_channel_larger(scale: Array) -> Array:
    scale[5] *= 16
    return scale


def _fewer_bits(bits: int, *, per_tensor: bool = False) -> Edit:
    """Round all int8 weights to fewer bits, or to one scale per tensor."""

    def edit(model: ModelProto) -> None:
        for weight in list(model.graph.initializer):
            if weight.name.endswith(".weight/int8"):
                name = weight.name.removesuffix("/int8")
                scale = read(model, f"{name}/scale/fp16").astype(np.float32)
                array = read(model, weight.name).astype(np.float32) * scale
                levels = 2 ** (bits - 1) - 1
                step = np.abs(array).max() / levels if per_tensor else 127 * scale / levels
                grid = np.round(array / step) * step
                write(model, weight.name, np.clip(np.round(grid / scale), -127, 127))

    return edit


def _scales_exchanged(model: ModelProto) -> None:
    names = [f"blocks.0.{linear}.input_scale/fp16" for linear in ("attn.proj", "mlp.fc1")]
    first, second = (read(model, name) for name in names)
    write(model, names[0], second)
    write(model, names[1], first)


def _weights_exchanged(model: ModelProto) -> None:
    names = [f"blocks.{block}.attn.proj.weight/int8" for block in (1, 2)]
    first, second = (read(model, name) for name in names)
    write(model, names[0], second)
    write(model, names[1], first)


def _scale_of_rows(model: ModelProto) -> None:
    """Use scales per input channel instead of per output channel; the weight is square."""
    node = next(n for n in model.graph.node if n.name == f"{_PROJ}/weight_DQ")
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = 0


def _quantised_to(value: str, scale: float) -> Edit:
    """Quantise a tensor that should stay in floating point, with this scale."""

    def change(steps: Steps) -> str:
        step = steps.like(scale, steps.value)
        zero = steps.const(0, np.int8)
        whole = steps.op("QuantizeLinear", steps.value, step, zero)
        return steps.op("DequantizeLinear", whole, step, zero)

    return _on(value, change)


def _mean_scale(scale: Array) -> Array:
    return np.full_like(scale, scale.mean())


MORE_INT8_FAULTS: dict[str, tuple[Edit, float]] = {
    **_both(_ANY_PRECISION, "int8"),
    "a zero point of 90 on both sides": (_both_sides("input_zero_point", lambda z: z + 90), 30),
    "the scale of one weight channel times 16": (
        _change(f"{_FC1}.weight/scale/fp16", _one_channel_larger),
        37,
    ),
    "one weight scale for all channels": (_change(f"{_PROJ}.weight/scale/fp16", _mean_scale), 36),
    "weight channels in another order": (
        _change(f"{_PROJ}.weight/int8", lambda w: np.roll(w, 1, axis=-1)),
        15,
    ),
    "input channels in another order": (
        _change(f"{_FC1}.weight/int8", lambda w: np.roll(w, 1, axis=0)),
        25,
    ),
    "weights of two blocks exchanged": (_weights_exchanged, 15),
    "a weight transposed before it was quantised": (
        _change(f"{_PROJ}.weight/int8", np.transpose),
        15,
    ),
    "scales of the wrong axis": (_scale_of_rows, 37),
    "activations clipped to a quarter": (_both_sides("input_scale/fp16", lambda s: s / 4), 30),
    "all activations clipped to half": (_all_scales(0.5), 30),
    "activations of 4 bits": (_all_scales(16), 25),
    "weights of 4 bits": (_fewer_bits(4), 28),
    "weights of 4 bits, a scale a tensor": (_fewer_bits(4, per_tensor=True), 26),
    "weights of 5 bits": (_fewer_bits(5), 36),
    "scales of two Linears exchanged": (_scales_exchanged, 38),
    "the sign of an int8 weight": (_change(f"{_FC1}.weight/int8", lambda w: -w), 15),
    "int8 weights read as shifted by one": (_change(f"{_PROJ}.weight/int8", lambda w: w + 1), 35),
    "a bias in the int8 graph dropped": (_change(f"{_FC1}.bias", np.zeros_like), 36),
    "the residual quantised": (_quantised_to("blocks.2/Add_1", 0.5), 35),
    "the attention quantised": (_quantised_to("blocks.2.attn/Softmax", 0.25), 30),
    "the logits quantised": (_quantised_to("logits/fp16", 0.5), 37),
    "int8 weights cut at 64": (_change(f"{_FC1}.weight/int8", lambda w: np.clip(w, -64, 63)), 36),
}
