"""Graphs in which several nodes read one constant, and their twins in which each has its own."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import ModelProto

__all__ = ["KINDS", "alike", "apart", "shared"]

# Which weights become equal: the first that matches gives its values to the others of its shape.
KINDS = {
    "gains": r"norm\d?\.weight$",
    "offsets": r"norm\d?\.bias$",
    "biases": r"(proj|fc1|fc2|qkv)\.bias$",
    "tied qkv": r"qkv\.(weight|bias)$",
    "tied fc1": r"fc1\.weight$",
    "tied fc2": r"fc2\.weight$",
    "everything": r"^blocks\..*\.(weight|bias)$",
}


def alike(source: Path, target: Path, kind: str) -> Path:
    """A copy of a graph in which all weights of a kind and a shape have the same values."""
    model = onnx.load(source)
    first: dict[tuple[str, tuple[int, ...]], onnx.TensorProto] = {}
    for weight in model.graph.initializer:
        if re.search(KINDS[kind], weight.name):
            leaf = ".".join(weight.name.split(".")[-2:]).replace("norm2", "norm1")
            origin = first.setdefault((leaf, tuple(weight.dims)), weight)
            weight.raw_data = origin.raw_data
    onnx.save(model, target)
    return target


def shared(source: Path, target: Path) -> Path:
    """A copy of a graph in which equal constants are one constant."""
    model = onnx.load(source)
    names: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    for weight in list(model.graph.initializer):
        key = (weight.data_type, tuple(weight.dims), weight.raw_data)
        renamed[weight.name] = names.setdefault(key, weight.name)
        if renamed[weight.name] != weight.name:
            model.graph.initializer.remove(weight)
    assert len(names) < len(renamed)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    onnx.save(model, target)
    return target


def apart(model: ModelProto) -> bool:
    """Whether no two nodes of ``model`` read the same weight of more than one axis or element."""
    weights = {w.name for w in model.graph.initializer if len(w.dims)}
    readers = [name for node in model.graph.node for name in node.input if name in weights]
    return len(readers) == len(set(readers))
