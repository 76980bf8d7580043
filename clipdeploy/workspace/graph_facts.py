"""Reads the facts of a passport from the ONNX graph itself, for comparison by :mod:`.passports`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, numpy_helper

from clipdeploy.core.passport import CONTEXT, Passport, Precision, Preprocess, TensorSpec
from exporters.headers import read_skeleton
from exporters.preprocess_graph import scale_and_offset
from exporters.products import find_products, tensor_types
from exporters.signature import classifier_signature, text_signature

__all__ = ["GraphFacts", "graph_facts"]

# LayerNorm's eps for each choice of numerics, as ``clipdeploy.models.load`` builds the network.
_EPS = {1e-5: "trained", 1e-6: "as-shipped"}
# A few float32 steps: the file has these numbers rounded from float64.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class GraphFacts:
    """Facts from a graph's nodes and weights, not from its passport.

    ``eps`` is LayerNorm's, None if it differs between them. ``numerics`` is the choice with this
    eps, None for any other, as in a graph that is to be judged because of that.
    ``normalisation_matches`` is False if the graph takes uint8 and normalises it with another mean
    or std than its passport's.
    """

    input: TensorSpec
    output: TensorSpec
    precision: Precision
    eps: float | None
    numerics: str | None
    normalisation_matches: bool


def graph_facts(path: Path, passport: Passport) -> GraphFacts:
    """Read the facts of the graph at ``path``; ``passport`` gives image size and number of classes.

    Raises:
        FileError: the file cannot be opened.
        GraphError: not an ONNX graph, or not a classifier of that image size and number of classes,
            or not a text tower of that embedding.
    """
    if passport.tower == "text":
        image, logits = text_signature(path, CONTEXT, passport.classes)
    else:
        image, logits = classifier_signature(path, passport.preprocess.size, passport.classes)
    model = read_skeleton(path)
    eps = _eps(model)
    return GraphFacts(
        image,
        logits,
        _precision(model),
        eps,
        _numerics(eps),
        _normalisation_matches(model, passport.preprocess),
    )


def _precision(model: ModelProto) -> Precision:
    """Return the stages' name: 8-bit products with a float16 or float32 rest, else the rest."""
    halves = "fp16" in tensor_types(model)
    products = {product.precision for product in find_products(model)}
    if "int8" in products:
        return "int8" if halves else "int8-cpu"
    if "fp8" in products:
        return "fp8"
    return "fp16" if halves else "fp32"


def _eps(model: ModelProto) -> float | None:
    found = {
        float(attribute.f)
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    }
    return found.pop() if len(found) == 1 else None


def _numerics(eps: float | None) -> str | None:
    known = (name for each, name in _EPS.items() if eps and np.isclose(each, eps, _ROUNDING, 0))
    return next(known, None)


def _normalisation_matches(model: ModelProto, spec: Preprocess) -> bool:
    scale, offset = scale_and_offset(spec)
    wanted = {"preprocess/scale": scale, "preprocess/offset": offset}
    for weight in model.graph.initializer:
        if weight.name in wanted:
            found = numpy_helper.to_array(weight).astype(np.float64).ravel()
            if found.shape != (3,) or not np.allclose(found, wanted[weight.name], _ROUNDING, 0):
                return False
    return True
