"""A rotation of the residual stream keeps the function; one that moves the mean does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from script_module import load_script

from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

WIDTH = cards.find(cards.DEMO).width
F32 = NDArray[np.float32]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/rotation")


@pytest.fixture
def rotated_db(
    script: ModuleType, demo_workspace: Workspace, demo_images: F32, tmp_path: Path
) -> Callable[[Callable[[ir.Model], None]], float]:
    """The SQNR in dB of the demo's graph after a rotation."""
    source = demo_workspace.graph(cards.DEMO, "fp32")

    def measure(rotation: Callable[[ir.Model], None]) -> float:
        script.rotated(source, tmp_path / "rotated.onnx", rotation)
        pair = (script.logits(path, demo_images) for path in (source, tmp_path / "rotated.onnx"))
        found: float = script.decibels(*pair)
        return found

    return measure


@pytest.mark.parametrize("width", [16, 32, 64, 96, 384, 768])
def test_matrices_are_orthogonal_and_keep_the_mean(script: ModuleType, width: int) -> None:
    matrices = (
        [script.flat(width)] if width > 100 else [script.flat(width), script.mean_keeping(width)]
    )
    for q in matrices:
        assert np.abs(q @ q.T - np.eye(width)).max() < 1e-12
        assert np.abs(q @ np.ones(width) - 1).max() < 1e-12


def test_flat_entries_are_small(script: ModuleType) -> None:
    assert np.abs(script.flat(64)).max() * 8 == 1
    # A factor of 3 or 6 is less flat: 2 / 3 instead of 1 / sqrt(3).
    assert np.abs(script.flat(96)).max() * np.sqrt(96) < 1.7


# Float32 graphs of one function differ in the order of their sums only, by 1e-6 of the logits.
@pytest.mark.parametrize("name", ["heads", "random", "flat+heads"])
def test_rotated_graphs_compute_the_same_logits(
    script: ModuleType, rotated_db: Callable[..., float], name: str
) -> None:
    assert rotated_db(script.rotations(WIDTH)[name]) > 110


def test_a_rotation_that_moves_the_mean_changes_the_function(
    script: ModuleType, rotated_db: Callable[..., float]
) -> None:
    q = script.random_orthogonal(WIDTH)
    assert np.abs(q @ np.ones(WIDTH) - 1).max() > 1
    assert rotated_db(lambda model: script.rotate_stream(model, q)) < 20


def test_a_rotation_across_heads_changes_the_function(
    script: ModuleType, rotated_db: Callable[..., float]
) -> None:
    q = script.random_orthogonal(WIDTH)
    assert rotated_db(lambda model: script.rotate_heads(model, q, heads=1)) < 20


def test_a_changed_function_stops_the_script(
    script: ModuleType, demo_workspace: Workspace, demo_images: F32, tmp_path: Path
) -> None:
    q = script.random_orthogonal(WIDTH)
    with pytest.raises(SystemExit, match=r"only .* dB from the original"):
        script.measure(
            demo_workspace.graph(cards.DEMO, "fp32"),
            tmp_path,
            lambda model: script.rotate_stream(model, q),
            demo_images,
        )
