"""Graphs with shared constants are quantised as if each node had separate ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from planted import calibrated
from shared_constants import KINDS, alike, shared

from calibration.config import QuantizeConfig
from calibration.policy import find_linears
from calibration.qdq import quantize, smooth
from calibration.scheme import SchemeConfig
from exporters.graphs import load_graph, write_model
from exporters.samples import Samples
from exporters.session import OnnxSession

Images = NDArray[np.float32]

# Two float32 graphs of the same function, relative to the logits.
SAME = 1e-5
ALL = QuantizeConfig()
STEPS = {
    "nothing": SchemeConfig("minmax", False, False, False, False),
    "smoothing": SchemeConfig("minmax", True, False, False, False),
    "shift": SchemeConfig("auto", False, True, False, False),
    "clipping": SchemeConfig("minmax", False, False, True, False),
    "bias correction": SchemeConfig("minmax", False, False, False, True),
}


def _logits(graph: Path, images: Images, *, exact: bool = False) -> Images:
    (logits,) = OnnxSession(graph, exact_int8=exact).run(images)
    return logits


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> tuple[Path, Path]:
    """One function as two graphs: with separate constants for each node, and with shared ones."""
    own = alike(source, tmp_path / "own.onnx", request.param)
    return own, shared(own, tmp_path / "shared.onnx")


def test_smoothing_keeps_the_function_of_a_graph_with_shared_constants(
    pair: tuple[Path, Path], demo_images: Images, tmp_path: Path
) -> None:
    graph = pair[1]
    table = calibrated(graph, tmp_path / "table.json", images=8)
    expected = _logits(graph, demo_images)
    model = load_graph(graph)
    assert smooth(model, table, frozenset(site.name for site in find_linears(model)))
    write_model(model, tmp_path / "smooth.onnx")
    found = _logits(tmp_path / "smooth.onnx", demo_images)
    assert np.abs(found - expected).max() < SAME * np.abs(expected).max()


def test_int8_is_the_same_whether_constants_are_shared(
    pair: tuple[Path, Path], demo_images: Images, samples: Samples, tmp_path: Path
) -> None:
    found = []
    for graph in pair:
        table, target = tmp_path / f"{graph.stem}.json", tmp_path / f"{graph.stem}.int8.onnx"
        calibrated(graph, table, images=8)
        quantize(graph, table, target, samples, ALL)
        found.append(_logits(target, demo_images))
    assert np.array_equal(*found)


@pytest.mark.parametrize("step", STEPS)
def test_each_correction_alone_is_the_same_whether_constants_are_shared(
    step: str,
    source: Path,
    demo_images: Images,
    samples: Samples,
    tmp_path: Path,
) -> None:
    own = alike(source, tmp_path / "own.onnx", "everything")
    config = QuantizeConfig(remainder="fp32", scheme=STEPS[step])
    found = []
    for graph in (own, shared(own, tmp_path / "shared.onnx")):
        table, target = tmp_path / f"{graph.stem}.json", tmp_path / f"{graph.stem}.int8.onnx"
        calibrated(graph, table, images=4)
        quantize(graph, table, target, samples, config)
        found.append(_logits(target, demo_images, exact=True))
    assert np.array_equal(*found)


def test_weights_of_a_linear_that_stays_are_left_alone(
    source: Path, samples: Samples, tmp_path: Path
) -> None:
    own = alike(source, tmp_path / "own.onnx", "tied fc2")
    graph, table = shared(own, tmp_path / "shared.onnx"), tmp_path / "table.json"
    calibrated(graph, table, images=4)
    config = QuantizeConfig(exclude=("blocks.3.mlp.fc2",), remainder="fp32")
    quantize(graph, table, tmp_path / "int8.onnx", samples, config)
    (kept,) = find_linears(load_graph(tmp_path / "int8.onnx"))
    (before,) = (s for s in find_linears(load_graph(graph)) if s.name == kept.name)
    assert _bytes(kept.weight) == _bytes(before.weight)


def _bytes(value: ir.Value) -> bytes:
    assert value.const_value is not None
    return bytes(value.const_value.numpy().tobytes())
