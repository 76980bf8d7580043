"""4-bit weights with a scale for each block of input channels."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray
from script_module import load_script

from calibration.fitting import fit_linears
from calibration.rounding import Moments, output_error, round_weight
from calibration.scheme import LinearScheme
from calibration.table import load_table
from calibration.weights import weight_error
from clipdeploy.core.errors import GraphError
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph

F32 = NDArray[np.float32]
BLOCK = 96


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/int4")


def test_the_block_is_the_width_of_a_narrow_model(script: ModuleType) -> None:
    assert script.block_of(cards.DEMO) == BLOCK
    assert script.block_of("clip-vit-base-p16") == 128


def test_the_graph_computes_the_numbers_and_scales(
    script: ModuleType, demo_workspace: Workspace, demo_images: F32
) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    table = load_table(demo_workspace.calibration(cards.DEMO))
    model = load_graph(graph)
    schemes = script.nearest(model, table, BLOCK, clip=False)
    numbers = schemes["blocks.0.mlp.fc2"].numbers.astype(int)
    assert (numbers.min(), numbers.max()) == (-7, 7)
    reference = script.run(model, demo_images)
    found = script.measured(graph, schemes, BLOCK, demo_images, reference)
    assert found > 15
    # The scales of the next output channel.
    moved = {
        name: replace(scheme, weight_scale=np.roll(scheme.weight_scale, 1, axis=1))
        for name, scheme in schemes.items()
    }
    assert script.measured(graph, moved, BLOCK, demo_images, reference) < found - 3
    # Blocks that are not those of the scales.
    with pytest.raises(SystemExit, match=r"only .* dB from FP32 with equal weights"):
        script.measured(graph, schemes, 2 * BLOCK, demo_images, reference)


def test_rounding_on_data_takes_a_scale_for_each_block(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4000, 12)) @ rng.normal(size=(12, 64))).astype(np.float32)
    weight = rng.normal(size=(64, 40)).astype(np.float32)
    weight[::16] *= 5
    moments = Moments(64)
    moments.add(x + 0.1 * rng.normal(size=x.shape).astype(np.float32))
    nearest, scale = script.blocked_weight(weight, 16, None)

    def error(numbers: NDArray[np.generic]) -> float:
        return output_error(weight_error(weight, numbers, scale), moments.covariance)

    ours = round_weight(weight, scale, moments.covariance, script.INT4)
    assert error(ours) < error(nearest) / 3
    # Scales in the order of the variances, which the rows are rounded in, but not the weights.
    order = np.argsort(-np.diag(moments.covariance))
    wrong = round_weight(weight, scale[order], moments.covariance, script.INT4)
    assert error(wrong) > error(nearest)


def test_fitting_leaves_the_inputs_as_they_are(
    script: ModuleType, demo_workspace: Workspace, demo_images: F32, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = demo_workspace.graph(cards.DEMO, "fp32")
    table = load_table(demo_workspace.calibration(cards.DEMO))
    model = load_graph(graph)
    schemes = script.nearest(model, table, BLOCK, clip=True)
    first = {name: each for name, each in schemes.items() if name.startswith("blocks.0.")}
    reference = script.run(model, demo_images)

    def decibels(found: dict[str, LinearScheme]) -> float:
        changed = load_graph(graph)
        script.simulate(changed, found, BLOCK)
        return float(script.decibels(reference, script.run(changed, demo_images)))

    assert decibels(script.fitted(model, table, first)) > decibels(first) + 3
    # Twin: the inputs would be rounded to 4 bits as well, which ONNX Runtime does not take.
    monkeypatch.setattr(script, "fit_linears", lambda *given, weights_only: fit_linears(*given))
    with pytest.raises(GraphError, match="QuantizeLinear"):
        script.fitted(model, table, first)
