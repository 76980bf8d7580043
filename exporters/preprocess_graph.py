"""Adds the normalisation and transposition of images to a graph.

    uint8 (B, S, S, 3) -> Cast -> Transpose -> * 1 / (255 std) -> - mean / std -> (B, 3, S, S)

The graph then takes uint8 crops, a quarter of the bytes of float32.  Decoding, resizing and
cropping are not included: no ONNX operator computes them exactly like Pillow.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.passport import Passport, Preprocess
from exporters.initializers import add_initializer

__all__ = ["PREPROCESS_TENSORS", "add_preprocessing", "preprocessed_passport", "scale_and_offset"]

# These stay float32 in an FP16 graph: float16 would round every pixel before normalisation.
PREPROCESS_TENSORS = ("preprocess/float", "preprocess/planar", "preprocess/scaled")
_NORMALISED = "preprocess/normalised"


def scale_and_offset(spec: Preprocess) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the scale (3,) and offset (3,), float32, that normalise a uint8 image.

    (x / 255 - mean) / std = x * (1 / (255 std)) + (-mean / std), rounded once from float64.
    """
    mean, std = np.asarray(spec.mean, np.float64), np.asarray(spec.std, np.float64)
    return (1.0 / (255.0 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def preprocessed_passport(passport: Passport) -> Passport:
    """Return ``passport`` with the input of a graph after :func:`add_preprocessing`."""
    batch, channels, height, width = passport.input.shape
    spec = replace(passport.input, dtype="uint8", shape=(batch, height, width, channels))
    return replace(passport, input=spec)


def add_preprocessing(model: ir.Model, spec: Preprocess) -> None:
    """Replace the float32 (B, 3, S, S) input of ``model`` by a uint8 (B, S, S, 3) one."""
    graph = model.graph
    old = graph.inputs[0]
    assert old.shape is not None
    batch, channels, height, width = old.shape
    image = ir.Value(
        name=old.name,
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape((batch, height, width, channels)),
    )
    scale, offset = (array.reshape(3, 1, 1) for array in scale_and_offset(spec))
    cast = ir.node("Cast", [image], {"to": int(ir.DataType.FLOAT)})
    planar = ir.node("Transpose", [cast.outputs[0]], {"perm": [0, 3, 1, 2]})
    scaled = ir.node("Mul", [planar.outputs[0], add_initializer(graph, "preprocess/scale", scale)])
    shifted = ir.node(
        "Add", [scaled.outputs[0], add_initializer(graph, "preprocess/offset", offset)]
    )
    nodes = (cast, planar, scaled, shifted)
    for node, name in zip(nodes, (*PREPROCESS_TENSORS, _NORMALISED), strict=True):
        node.name = node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = image.shape if node is cast else old.shape
    old.name = "preprocess/replaced"
    ir.convenience.replace_all_uses_with(old, shifted.outputs[0])
    graph.insert_before(graph[0], nodes)
    graph.inputs[0] = image
