"""Creates equivalent graphs with shared and with separate constants."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import ModelProto

__all__ = ["KINDS", "alike", "apart", "shared"]

# Weights to make equal: the first match is copied to the others of its shape.
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
    """Copy a graph and give all weights of a kind and a shape the same values."""
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
    """Copy a graph and merge equal constants."""
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
    """Return whether no two nodes of ``model`` share a weight of several axes or elements."""
    weights = {w.name for w in model.graph.initializer if len(w.dims)}
    readers = [name for node in model.graph.node for name in node.input if name in weights]
    return len(readers) == len(set(readers))
