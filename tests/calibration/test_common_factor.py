"""A common factor of a norm or V and the next weight is removed before INT8."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from planted import calibrated, edit

from calibration.config import QuantizeConfig
from calibration.distribution import Distribution
from calibration.policy import find_linears
from calibration.qdq import quantize
from calibration.smoothing import search_folding
from calibration.table import CalibrationTable
from exporters.graphs import load_graph
from exporters.samples import Samples
from exporters.session import OnnxSession

Array = NDArray[np.float32]


def _times(factor: float) -> Callable[[Array], Array]:
    return lambda array: array * np.float32(factor)


def _norms(factor: float, block: int) -> dict[str, Callable[[Array], Array]]:
    edits: dict[str, Callable[[Array], Array]] = {}
    for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
        for leaf in ("weight", "bias"):
            edits[f"blocks.{block}.{norm}.{leaf}"] = _times(factor)
        edits[f"blocks.{block}.{linear}.weight"] = _times(1 / factor)
    return edits


def _values(factor: float, block: int) -> dict[str, Callable[[Array], Array]]:
    def columns(array: Array) -> Array:
        array = array.copy()
        array[..., 2 * array.shape[-1] // 3 :] *= np.float32(factor)
        return array

    attention = f"blocks.{block}.attn"
    return {
        f"{attention}.qkv.weight": columns,
        f"{attention}.qkv.bias": columns,
        f"{attention}.proj.weight": _times(1 / factor),
    }


def _sqnr(graph: Path, samples: Samples, images: Array, folder: Path) -> float:
    (expected,) = OnnxSession(graph).run(images)
    table, target = folder / "table.json", folder / "int8.onnx"
    calibrated(graph, table, images=16)
    quantize(graph, table, target, samples, QuantizeConfig())
    (found,) = OnnxSession(target).run(images)
    return 10 * math.log10(float((expected**2).sum() / ((found - expected) ** 2).sum()))


@pytest.fixture(scope="module")
def plain(
    source: Path, samples: Samples, demo_images: Array, tmp_path_factory: pytest.TempPathFactory
) -> float:
    """The SQNR of the demo's INT8 graph in dB."""
    return _sqnr(source, samples, demo_images, tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("factor", [1e4, 1e-4, 300.0])
@pytest.mark.parametrize("edits", [_norms, _values])
def test_int8_is_as_good_with_a_common_factor(
    edits: Callable[[float, int], dict[str, Callable[[Array], Array]]],
    factor: float,
    plain: float,
    source: Path,
    samples: Samples,
    demo_images: Array,
    tmp_path: Path,
) -> None:
    every = {name: change for at in range(6) for name, change in edits(factor, at).items()}
    graph = edit(source, tmp_path / "scaled.onnx", every)
    # Histogram bins are coarser for such large or small values: at most 1 dB.
    assert _sqnr(graph, samples, demo_images, tmp_path) > plain - 2


def test_an_ordinary_model_has_no_common_factor(source: Path, demo_table: CalibrationTable) -> None:
    for site in find_linears(load_graph(source)):
        if site.role == "mlp.fc2":
            continue
        assert site.weight.const_value is not None
        values = Distribution.of(demo_table.of(site.name))
        scale = search_folding(values, site.weight.const_value.numpy()).scale
        assert np.exp(np.log(scale).mean()) == pytest.approx(1)
