"""Which artifact runs if ``predict_images`` is given none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import clipdeploy.stages.predict as stage
from clipdeploy.core.passport import Precision
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


@pytest.fixture
def workspace(demo_workspace: Workspace, tmp_path: Path) -> Workspace:
    """A workspace that also has a file with the name of an INT8 graph for CPUs."""
    copy = Workspace(tmp_path / "artifacts")
    shutil.copytree(demo_workspace.root, copy.root)
    shutil.copy(copy.graph(cards.DEMO, "fp32"), copy.graph(cards.DEMO, "int8-cpu"))
    return copy


@pytest.mark.parametrize(
    ("problem", "chosen"), [("there is no GPU", "int8-cpu"), ("", "fp16"), ("cuDNN", "int8-cpu")]
)
def test_int8_for_cpus_is_the_fastest_graph_only_without_cuda(
    problem: str, chosen: Precision, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "cuda_problem", lambda: problem)
    fastest = next(path for path in stage._by_speed(workspace, cards.DEMO) if path.exists())
    assert fastest == workspace.graph(cards.DEMO, chosen)
