"""A graph that returns the wrong number of rows or classes ends the run; no row is guessed."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from shape_faults import SHAPE_FAULTS

from clipdeploy.core.errors import ArtifactError
from clipdeploy.imaging import open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

# Three full batches: some of the faults do not show in one of them.
CONFIG = VerifyConfig(max_drop=9.0, batch=16, workers=0)


def judge(path: Path, model: LoadedModel) -> None:
    images = select(open_images(cards.demo_file("test.zip"), tuple("0123456789")), 48, seed=0)
    target = Target(path, "graph", read_passport(path))
    run_verification(model, target.passport, [target], images, CONFIG)


def test_the_sound_graph_runs_to_the_end(
    demo_workspace: Workspace, demo_model: LoadedModel
) -> None:
    judge(demo_workspace.graph(cards.DEMO, "fp32"), demo_model)


@pytest.mark.parametrize("name", SHAPE_FAULTS)
def test_a_fault_in_the_shape_is_refused(
    name: str, demo_workspace: Workspace, demo_model: LoadedModel, tmp_path: Path
) -> None:
    model = onnx.load(demo_workspace.graph(cards.DEMO, "fp32"))
    SHAPE_FAULTS[name](model)
    path = tmp_path / "faulty.onnx"
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="gave logits of shape"):
        judge(path, demo_model)
