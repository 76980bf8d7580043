"""Checks an exported graph before it is saved.  A failed check is an error."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError, first_line
from clipdeploy.core.passport import Passport, TensorSpec
from exporters.graphs import structure, weight_proto
from exporters.session import OnnxSession

__all__ = [
    "PARITY_BATCHES",
    "PARITY_TOLERANCE",
    "check_parity",
    "check_structure",
    "parity_bound",
]

# One image, and a size that is not a multiple of any kernel's power of two.  The traced size, 2, is
# left out: a graph that is bound to it fails at both.  The images are most of the check's time.
PARITY_BATCHES = (1, 3)

# Relative to the spread of the logits, because errors scale with the logits: a ten times larger
# head weight makes the logits and all their errors ten times larger.  Computing in float32 instead
# of float64 costs 5e-7 (clip-vit-demo) to 4e-6 (ViT-B/32); tanh GELU, the smallest mistake to find,
# 1.9e-4 (two blocks) to 8e-4 (ViT-B/32).
PARITY_TOLERANCE = 1e-4

# A large common bias adds nothing to the spread, but float32 rounding grows with it: each term of
# the head's sum is rounded, and runtimes sum in different orders.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)

_STRUCTURE_ONLY_BYTES = 1024


def _spec(value: ir.Value) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape or ())
    dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
    names = {"float": "float32", "double": "float64"}
    return TensorSpec(value.name or "", names.get(dtype, dtype), shape)


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return the graph with each large weight replaced by an input of its type and shape."""
    proto = structure(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _STRUCTURE_ONLY_BYTES:
            info = onnx.helper.make_tensor_value_info(
                value.name or "", tensor.dtype.value, tensor.numpy().shape
            )
            proto.graph.input.append(info)
        else:
            proto.graph.initializer.append(weight_proto(value))
    return proto


def check_structure(model: ir.Model, passport: Passport) -> None:
    """Run ONNX's checker with full shape inference and compare the graph with its passport.

    Raises:
        GraphError: the graph is invalid, or its input or output differs from the passport's.
    """
    try:
        onnx.checker.check_model(_without_weights(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(
            f"the graph of {passport.model} is not valid ONNX: {first_line(error)}"
        ) from error
    for role, found, expected in (
        ("input", model.graph.inputs, passport.input),
        ("output", model.graph.outputs, passport.output),
    ):
        specs = [_spec(value) for value in found]
        if specs != [expected]:
            raise GraphError(
                f"the graph of {passport.model} has {role} {specs}, its passport has {expected}"
            )


def parity_bound(
    reference: Iterable[NDArray[np.float32]], tolerance: float = PARITY_TOLERANCE
) -> float:
    """Return the largest allowed difference between a logit and its reference.

        tolerance RMS(l - mean l) + 8 eps max |l|

    The mean is over the classes of an image, RMS and maximum over all logits l of ``reference``,
    (b, classes) each.  With a single class the mean is not subtracted.
    """
    logits = np.concatenate(list(reference)).astype(np.float64)
    middle = logits.mean(axis=1, keepdims=True) if logits.shape[1] > 1 else 0.0
    spread = float(np.sqrt(((logits - middle) ** 2).mean()))
    return tolerance * spread + _ROUNDING * float(np.abs(logits).max())


def check_parity(
    path: Path,
    images: NDArray[Any],
    reference: dict[int, NDArray[np.float32]],
    tolerance: float = PARITY_TOLERANCE,
) -> float:
    """Run the graph at every reference batch size; return the largest difference of a logit.

    ``images`` are (B, 3, S, S), or token ids (B, 77); ``reference`` maps b to PyTorch's logits
    (b, classes) of the first b of them.

    Raises:
        GraphError: a logit differs by more than :func:`parity_bound`, or is not finite.
    """
    session = OnnxSession(path, lean=True)
    worst = 0.0
    for count, expected in reference.items():
        logits = session.run(images[:count])[0]
        if logits.shape != expected.shape:
            raise GraphError(
                f"at batch {count} the graph returns shape {logits.shape}, PyTorch {expected.shape}"
            )
        for owner, values in (("the graph's", logits), ("PyTorch's", expected)):
            if not np.isfinite(values).all():
                raise GraphError(f"at batch {count} {owner} logits are not finite")
        worst = max(worst, float(np.abs(logits - expected).max()))
    bound = parity_bound(reference.values(), tolerance)
    if not worst <= bound:
        raise GraphError(
            f"the graph's logits differ from PyTorch's by {worst:.2e}, more than {bound:.1e} "
            f"({tolerance:.0e} of their spread)",
            hint="the export is wrong, or the model is not deterministic",
        )
    return worst
