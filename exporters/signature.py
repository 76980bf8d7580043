"""Reads the input and output of an ONNX file without a passport."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from clipdeploy.core.errors import GraphError
from clipdeploy.core.passport import TOKENS, TensorSpec
from exporters.headers import read_skeleton
from exporters.products import tensor_types

__all__ = ["classifier_signature", "stored_types", "stores_float16", "text_signature"]

_IMAGE_TYPES = ("float32", "float16", "uint8")
_TOKEN_TYPES = ("int32", "int64")


def _spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    kind = TensorProto.UNDEFINED if not tensor.elem_type else tensor.elem_type
    name = str(helper.tensor_dtype_to_np_dtype(kind)) if kind else "unknown"
    shape = tuple(axis.dim_value or axis.dim_param or "?" for axis in tensor.shape.dim)
    return TensorSpec(value.name, name, shape)


def _shown(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{s.name} {s.dtype} {list(s.shape)}" for s in specs) or "nothing"


def _is_image(spec: TensorSpec, size: int) -> bool:
    """Return whether this is float (B, 3, S, S) or uint8 (B, S, S, 3); axes may be symbolic."""
    expected = (size, size, 3) if spec.dtype == "uint8" else (3, size, size)
    fits = zip(spec.shape[1:], expected, strict=False)
    return (
        spec.dtype in _IMAGE_TYPES
        and len(spec.shape) == 4
        and all(isinstance(axis, str) or axis == edge for axis, edge in fits)
    )


def _is_logits(spec: TensorSpec, classes: int) -> bool:
    axes = spec.shape[1:]
    return (
        spec.dtype.startswith("float")
        and len(spec.shape) == 2
        and (isinstance(axes[0], str) or axes[0] == classes)
    )


def classifier_signature(path: Path, size: int, classes: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the image input and the logits output of a graph.

    ``size`` is the expected edge in pixels, ``classes`` the expected number of logits.

    Raises:
        FileError: the file cannot be opened.
        GraphError: it is not an ONNX graph with one image input and one logits output of these
            sizes.
    """
    inputs, outputs = _interface(path)
    if len(inputs) != 1 or not _is_image(inputs[0], size):
        raise GraphError(
            f"{path} takes {_shown(inputs)}, not one image of {size} pixels",
            hint="a classifier takes float (B, 3, S, S) or uint8 (B, S, S, 3); pass its --model",
        )
    if len(outputs) != 1 or not _is_logits(outputs[0], classes):
        raise GraphError(
            f"{path} gives {_shown(outputs)}, not logits of {classes} classes",
            hint="a classifier gives one output (B, classes); pass its --model",
        )
    return inputs[0], outputs[0]


def _interface(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    graph = read_skeleton(path).graph
    weights = {weight.name for weight in graph.initializer}
    inputs = [_spec(value) for value in graph.input if value.name not in weights]
    return inputs, [_spec(value) for value in graph.output]


def text_signature(path: Path, tokens: int, width: int) -> tuple[TensorSpec, TensorSpec]:
    """Return the input of token ids (B, tokens) and the output of embeddings (B, width) of a graph.

    Raises:
        FileError: the file cannot be opened.
        GraphError: it is not an ONNX graph with one such input and one such output.
    """
    inputs, outputs = _interface(path)
    fits = len(inputs) == 1 and inputs[0].name == TOKENS and inputs[0].dtype in _TOKEN_TYPES
    if not fits or inputs[0].shape[1:] != (tokens,):
        raise GraphError(
            f"{path} takes {_shown(inputs)}, not the ids of {tokens} tokens",
            hint="a text tower takes int32 (B, 77): export it with --text-tower",
        )
    if len(outputs) != 1 or not _is_logits(outputs[0], width):
        raise GraphError(
            f"{path} gives {_shown(outputs)}, not embeddings of {width} numbers",
            hint="a text tower gives one output (B, D): export it with --text-tower",
        )
    return inputs[0], outputs[0]


def stores_float16(source: Path | ModelProto) -> bool:
    """Return whether any tensor of a graph is float16, at any depth.

    Raises:
        FileError, GraphError: the graph cannot be read.
    """
    return "fp16" in stored_types(source)


def stored_types(source: Path | ModelProto) -> set[str]:
    """Return the types of a graph's tensors, see :func:`exporters.products.tensor_types`.

    Raises:
        FileError, GraphError: the graph cannot be read.
    """
    return tensor_types(read_skeleton(source) if isinstance(source, Path) else source)
