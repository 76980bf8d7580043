"""Rewrites of the demo's graphs that compute the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from graph_edits import Edit, Steps, add_weight, read, write
from harmless_changes import FP32_CHANGES
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

__all__ = ["MORE_FP16_CHANGES", "MORE_FP32_CHANGES", "MORE_INT8_CHANGES"]

Array = NDArray[Any]
_HEADS = 6


def _on(value: str, change: Callable[[Steps], str]) -> Edit:
    def edit(model: ModelProto) -> None:
        steps = Steps(model, value)
        steps.finish(change(steps))

    return edit


def _replaced(name: str, make: Callable[[Steps, list[str]], str]) -> Edit:
    """Replace the node ``name`` by other nodes with the same result."""

    def edit(model: ModelProto) -> None:
        node = next(each for each in model.graph.node if each.name == name)
        steps = Steps(model, node.output[0])
        steps.finish(make(steps, list(node.input)))
        model.graph.node.remove(next(each for each in model.graph.node if each.name == name))

    return edit


def _gelu(steps: Steps, inputs: list[str]) -> str:
    """Compute x (1 + erf(x / sqrt 2)) / 2."""
    (x,) = inputs
    error = steps.op("Erf", steps.op("Mul", x, steps.const(2**-0.5)))
    half = steps.op("Mul", x, steps.const(0.5))
    return steps.op("Mul", half, steps.op("Add", error, steps.const(1)))


def _layer_norm(steps: Steps, inputs: list[str]) -> str:
    x, gamma, beta = inputs
    last = steps.const([-1], np.int64)
    centred = steps.op("Sub", x, steps.op("ReduceMean", x, last))
    variance = steps.op("ReduceMean", steps.op("Mul", centred, centred), last)
    deviation = steps.op("Sqrt", steps.op("Add", variance, steps.const(1e-5)))
    scaled = steps.op("Mul", steps.op("Div", centred, deviation), gamma)
    return steps.op("Add", scaled, beta)


def _gemm(steps: Steps, inputs: list[str]) -> str:
    weight = steps.op("Transpose", inputs[1], perm=[1, 0])
    return steps.op("Add", steps.op("MatMul", inputs[0], weight), inputs[2])


def _two_products(steps: Steps, inputs: list[str]) -> str:
    """Split the weight's columns in two halves and concatenate the products."""
    columns = read(steps.model, inputs[1])
    halves = np.array_split(columns, 2, axis=1)
    products = [steps.op("MatMul", inputs[0], steps.const(each)) for each in halves]
    return steps.op("Concat", *products, axis=-1)


def _sum_of_products(steps: Steps, inputs: list[str]) -> str:
    """Split the weight into a sum of two and add the products."""
    weight = read(steps.model, inputs[1])
    part = np.random.default_rng(0).normal(0, 0.05, weight.shape)
    products = [steps.op("MatMul", inputs[0], steps.const(each)) for each in (part, weight - part)]
    return steps.op("Add", *products)


def _transposed_weight(steps: Steps, inputs: list[str]) -> str:
    turned = steps.const(read(steps.model, inputs[1]).T)
    return steps.op("MatMul", inputs[0], steps.op("Transpose", turned, perm=[1, 0]))


def _one_by_one(steps: Steps, inputs: list[str]) -> str:
    """Replace a Linear of tokens by a convolution with kernel size 1."""
    kernel = steps.const(read(steps.model, inputs[1]).T[:, :, None])
    across = steps.op("Transpose", inputs[0], perm=[0, 2, 1])
    return steps.op("Transpose", steps.op("Conv", across, kernel), perm=[0, 2, 1])


def _softmax(steps: Steps, inputs: list[str]) -> str:
    last = steps.const([-1], np.int64)
    powers = steps.op("Exp", steps.op("Sub", inputs[0], steps.op("ReduceMax", inputs[0], last)))
    return steps.op("Div", powers, steps.op("ReduceSum", powers, last))


def _wider(steps: Steps) -> str:
    return steps.op("Cast", steps.op("Cast", steps.value, to=TensorProto.DOUBLE), to=1)


def _there_and_back(steps: Steps) -> str:
    turned = steps.op("Transpose", steps.value, perm=[0, 2, 1])
    return steps.op("Transpose", turned, perm=[0, 2, 1])


def _cut_and_joined(steps: Steps) -> str:
    halves = steps.ops("Split", 2, steps.value, axis=-1, num_outputs=2)
    return steps.op("Concat", *halves, axis=-1)


def _flat_and_back(steps: Steps) -> str:
    shape = steps.op("Shape", steps.value)
    flat = steps.op("Reshape", steps.value, steps.const([-1], np.int64))
    return steps.op("Reshape", flat, shape)


def _dropout_off(steps: Steps) -> str:
    return steps.op("Dropout", steps.value, steps.const(0.5), steps.const(False, np.bool_))


def _times_power_of_two(steps: Steps) -> str:
    larger = steps.op("Mul", steps.value, steps.like(2.0, steps.value))
    return steps.op("Mul", larger, steps.like(0.5, steps.value))


def _constant_if(steps: Steps) -> str:
    always = steps.const([True], np.bool_)
    return steps.choose(always, steps.value, steps.value, branches=True)


def _if_by_size(steps: Steps) -> str:
    """Select by batch size between two branches that compute the same."""
    size = steps.op("Shape", steps.value, start=0, end=1)
    large = steps.op("Greater", size, steps.const([8], np.int64))
    doubled = steps.op("Mul", steps.value, steps.like(2.0, steps.value))
    other = steps.op("Mul", doubled, steps.like(0.5, steps.value))
    return steps.choose(large, steps.value, other, branches=True)


def _rows_there_and_back(steps: Steps) -> str:
    """Reverse the batch twice."""
    ends = ([-1], [np.iinfo(np.int64).min], [0], [-1])
    turn = [steps.const(each, np.int64) for each in ends]
    return steps.op("Slice", steps.op("Slice", steps.value, *turn), *turn)


def _padded_batch(steps: Steps) -> str:
    """Append eight rows of zeros to the batch and remove them at the end."""
    size = steps.op("Shape", steps.value, start=0, end=1)
    pads = steps.const([0, 0, 8, 0], np.int64)
    padded = steps.op("Pad", steps.value, pads)
    return steps.op("Slice", padded, steps.const([0], np.int64), size, steps.const([0], np.int64))


def _function(model: ModelProto) -> None:
    """Replace every GELU by a call of a local function."""
    inner = helper.make_node("Gelu", ["x"], ["y"])
    opset = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("tests", "Act", ["x"], ["y"], [inner], opset))
    model.opset_import.append(helper.make_opsetid("tests", 1))
    for node in model.graph.node:
        if node.op_type == "Gelu":
            node.op_type, node.domain = "Act", "tests"
            del node.attribute[:]


def _heads_in_another_order(model: ModelProto) -> None:
    order = [3, 1, 5, 0, 2, 4]
    for kind in ("weight", "bias"):
        array = read(model, f"blocks.1.attn.qkv.{kind}")
        split = array.reshape(*array.shape[:-1], 3, _HEADS, -1)
        write(model, f"blocks.1.attn.qkv.{kind}", split[..., order, :].reshape(array.shape))
    proj = read(model, "blocks.1.attn.proj.weight")
    rows = proj.reshape(_HEADS, -1, proj.shape[1])[order].reshape(proj.shape)
    write(model, "blocks.1.attn.proj.weight", rows)


def _neurons_in_another_order(model: ModelProto) -> None:
    order = np.random.default_rng(0).permutation(len(read(model, "blocks.3.mlp.fc1.bias")))
    write(model, "blocks.3.mlp.fc1.weight", read(model, "blocks.3.mlp.fc1.weight")[:, order])
    write(model, "blocks.3.mlp.fc1.bias", read(model, "blocks.3.mlp.fc1.bias")[order])
    write(model, "blocks.3.mlp.fc2.weight", read(model, "blocks.3.mlp.fc2.weight")[order])


def _gamma_folded(model: ModelProto) -> None:
    """Fold a LayerNorm's factors into the next weights."""
    gamma = read(model, "blocks.2.norm2.weight")
    beta = read(model, "blocks.2.norm2.bias")
    write(model, "blocks.2.norm2.weight", np.ones_like(gamma))
    write(model, "blocks.2.norm2.bias", beta / gamma)
    weight = read(model, "blocks.2.mlp.fc1.weight")
    write(model, "blocks.2.mlp.fc1.weight", weight * gamma[:, None])


def _signs_of_queries(model: ModelProto) -> None:
    """Change the sign of queries and keys; their products are equal."""
    for kind in ("weight", "bias"):
        array = read(model, f"blocks.0.attn.qkv.{kind}")
        width = array.shape[-1] // 3
        array[..., : 2 * width] *= -1
        write(model, f"blocks.0.attn.qkv.{kind}", array)


def _values_scaled(model: ModelProto) -> None:
    """Multiply the values by 4 and divide the projection's weights by 4."""
    for kind in ("weight", "bias"):
        array = read(model, f"blocks.4.attn.qkv.{kind}")
        width = array.shape[-1] // 3
        array[..., 2 * width :] *= 4
        write(model, f"blocks.4.attn.qkv.{kind}", array)
    write(model, "blocks.4.attn.proj.weight", read(model, "blocks.4.attn.proj.weight") / 4)


def _unused(model: ModelProto) -> None:
    add_weight(model, "unused/weight", np.ones((96, 5), np.float32))
    node = helper.make_node("MatMul", ["norm", "unused/weight"], ["unused"])
    model.graph.node.append(node)


def _another_axis_name(model: ModelProto) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    del model.graph.value_info[:]


def _batch_of(number: int) -> Edit:
    def edit(model: ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = number
        del model.graph.value_info[:]

    return edit


def _opset(version: int) -> Edit:
    def edit(model: ModelProto) -> None:
        model.opset_import[0].version = version

    return edit


def _commented(model: ModelProto) -> None:
    model.doc_string = model.graph.doc_string = "exported by hand"
    for node in model.graph.node:
        node.doc_string = "a node"
        del node.metadata_props[:]


def _commuted(model: ModelProto) -> None:
    """Swap the operands of every Add."""
    for node in model.graph.node:
        if node.op_type == "Add":
            node.input[:] = list(node.input)[::-1]


def _biases_by_and_by(model: ModelProto) -> None:
    """Split the head's bias, one part added after the head."""
    bias = read(model, "head.bias")
    write(model, "head.bias", np.zeros_like(bias))
    _on("logits", lambda steps: steps.op("Add", steps.value, steps.const(bias)))(model)


def _without_zero_points(model: ModelProto) -> None:
    """Remove zero points of 0 from DequantizeLinear, which is the default."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and len(node.input) == 3:
            del node.input[2]


def _scales_in_two(model: ModelProto) -> None:
    """Halve a weight's scale in DequantizeLinear and double its result."""
    name = "blocks.2.mlp.fc1.weight/scale/fp16"
    write(model, name, read(model, name) / 2)
    doubled = "blocks.2.mlp.fc1/weight_DQ"
    _on(doubled, lambda steps: steps.op("Mul", steps.value, steps.like(2.0, steps.value)))(model)


def _int8_sign(model: ModelProto) -> None:
    """Change the sign of a weight and of its scale."""
    name = "blocks.2.attn.proj.weight"
    write(model, f"{name}/int8", -np.clip(read(model, f"{name}/int8"), -127, 127))
    negative = "blocks.2.attn.proj/weight_DQ"
    _on(negative, lambda steps: steps.op("Neg", steps.value))(model)


def _int8_columns(model: ModelProto) -> None:
    """Permute the neurons of an MLP, with their scales and shifts."""
    fc1, fc2 = "blocks.3.mlp.fc1", "blocks.3.mlp.fc2"
    order = np.random.default_rng(0).permutation(len(read(model, f"{fc1}.bias")))
    for name in (f"{fc1}.weight/int8", f"{fc1}.weight/scale/fp16", f"{fc1}.bias"):
        write(model, name, read(model, name)[..., order])
    write(model, f"{fc2}.weight/int8", read(model, f"{fc2}.weight/int8")[order])
    for name in (f"{fc2}.input_shift/fp16", f"{fc2}.input_ratio/fp16"):
        known = [w.name for w in model.graph.initializer]
        if name in known and read(model, name).size == len(order):
            write(model, name, read(model, name)[..., order])


MORE_FP32_CHANGES: dict[str, Edit] = {
    "GELU written out": _replaced("blocks.2.mlp/Gelu", _gelu),
    "LayerNorm written out": _replaced("blocks.2.norm1/LayerNormalization", _layer_norm),
    "softmax written out": _replaced("blocks.2.attn/Softmax", _softmax),
    "Gemm as MatMul and Add": _replaced("head/Gemm", _gemm),
    "a weight cut in two": _replaced("blocks.1.mlp.fc1/MatMul", _two_products),
    "a weight as a sum of two": _replaced("blocks.1.mlp.fc2/MatMul", _sum_of_products),
    "a weight stored transposed": _replaced("blocks.1.attn.proj/MatMul", _transposed_weight),
    "a Linear as a convolution": _replaced("blocks.2.mlp.fc1/MatMul", _one_by_one),
    "a residual through float64": _on("blocks.2/Add_1", _wider),
    "a tensor transposed twice": _on("blocks.2/Add_1", _there_and_back),
    "a tensor cut and joined": _on("blocks.2/Add_1", _cut_and_joined),
    "a tensor flattened and shaped": _on("blocks.2/Add_1", _flat_and_back),
    "dropout in inference": _on("blocks.2/Add_1", _dropout_off),
    "times 2 and halved": _on("blocks.2/Add_1", _times_power_of_two),
    "an If that is always true": _on("logits", _constant_if),
    "an If by the batch size with equal branches": _on("logits", _if_by_size),
    "the batch turned twice": _on("logits", _rows_there_and_back),
    "rows added and cut off": _on("logits", _padded_batch),
    "a local function for GELU": _function,
    "heads in another order everywhere": _heads_in_another_order,
    "neurons in another order": _neurons_in_another_order,
    "a LayerNorm's factors in the weights": _gamma_folded,
    "queries and keys with another sign": _signs_of_queries,
    "values scaled, and the projection back": _values_scaled,
    "a node that nothing reads": _unused,
    "another name of the batch axis": _another_axis_name,
    "a fixed batch of 1": _batch_of(1),
    "a fixed batch of 24": _batch_of(24),
    "opset 22": _opset(22),
    "comments": _commented,
    "summands exchanged": _commuted,
    "the head's bias behind the head": _biases_by_and_by,
}
MORE_FP16_CHANGES: dict[str, Edit] = {
    **{
        f"fp16: {name}": FP32_CHANGES[name]
        for name in (
            "nodes and weights in another order",
            "initializers duplicated",
            "initializers as Constant nodes",
            "a fixed batch",
            "Identity nodes",
        )
    },
    "fp16: a tensor transposed twice": _on("blocks.2/Add_1", _there_and_back),
    "fp16: times 2 and halved": _on("blocks.2/Add_1", _times_power_of_two),
    "fp16: an If by the batch size with equal branches": _on("logits", _if_by_size),
    "fp16: neurons in another order": _neurons_in_another_order,
}
MORE_INT8_CHANGES: dict[str, Edit] = {
    "int8 initializers duplicated": FP32_CHANGES["initializers duplicated"],
    "int8 initializers as Constant nodes": FP32_CHANGES["initializers as Constant nodes"],
    "int8 with a fixed batch": FP32_CHANGES["a fixed batch"],
    "int8 with Identity nodes": FP32_CHANGES["Identity nodes"],
    "zero points left out": _without_zero_points,
    "a weight's scale in two factors": _scales_in_two,
    "an int8 weight with another sign": _int8_sign,
    "int8 neurons in another order": _int8_columns,
}
