from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from clipdeploy.core.errors import GraphError
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.parts import cut_out, run_part
from exporters.session import OnnxSession


@pytest.fixture(scope="module")
def source(demo_workspace: Workspace) -> Path:
    return demo_workspace.graph(cards.DEMO, "fp32")


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


def test_two_parts_compute_what_the_graph_does(
    source: Path, demo_images: NDArray[np.float32]
) -> None:
    model = load_graph(source)
    cut, logits = _value(model, "blocks.2/Add_1"), model.graph.outputs[0]
    with cut_out(model, None, cut) as first, cut_out(model, cut, logits) as second:
        assert len(list(first.graph)) + len(list(second.graph)) == len(list(model.graph))
        middle = [each for (each,) in run_part(first, list(first.graph.outputs), [demo_images])]
        ((found,),) = run_part(second, list(second.graph.outputs), middle)
    (expected,) = OnnxSession(source).run(demo_images)
    assert np.abs(found - expected).max() < 1e-4


def test_a_part_can_be_run_as_far_as_a_tensor_inside(
    source: Path, demo_images: NDArray[np.float32]
) -> None:
    model = load_graph(source)
    with cut_out(model, None, _value(model, "blocks.0/Add")) as part:
        inside = _value(part, "blocks.0.norm1")
        ((found,),) = run_part(part, [inside], [demo_images[:1]])
        assert [value.name for value in part.graph.outputs] == ["blocks.0/Add"]
    assert found.shape == (1, 65, 96)


def test_only_the_copy_loses_its_weights(source: Path) -> None:
    model = load_graph(source)
    with cut_out(model, None, model.graph.outputs[0]) as part:
        assert all(value.const_value is not None for value in part.graph.initializers.values())
    assert all(value.const_value is None for value in part.graph.initializers.values())
    assert all(value.const_value is not None for value in model.graph.initializers.values())


def test_a_tensor_that_is_no_cut_is_refused(source: Path) -> None:
    model = load_graph(source)
    part = cut_out(model, _value(model, "blocks.2.norm1"), model.graph.outputs[0])
    with (
        pytest.raises(GraphError, match=r"depends on image and not only on blocks\.2\.norm1"),
        part,
    ):
        pass
