"""A ViT whose training gave it heavy tails: INT8 keeps it, and plain min-max does not."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from script_module import load_script

from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice, load_model
from clipdeploy.workspace.folder import Workspace


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("train_heavy_tailed")


@pytest.fixture(scope="module")
def workspace(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    found: Workspace = script.calibrated(tmp_path_factory.mktemp("heavy") / "artifacts")
    return found


def test_int8_keeps_the_accuracy_and_min_max_is_worse(
    script: ModuleType, workspace: Workspace
) -> None:
    reference, top1, db = script.int8_row(workspace, script.RECIPES["default"])
    assert reference == pytest.approx(99.0)
    # One of 500 digits.
    assert top1 >= reference - 0.2
    assert db > 29
    *_, plain = script.int8_row(workspace, script.RECIPES["min-max"])
    assert plain < db - 4


def test_tails_are_heavy(
    script: ModuleType, demo_model: LoadedModel, demo_images: NDArray[np.float32]
) -> None:
    images = torch.from_numpy(demo_images)
    heavy = load_model(cards.find(script.CARD), WeightsChoice(script.FILE), Recipe())
    found, usual = (script.tails(each.module, images) for each in (heavy, demo_model))
    assert max(kurtosis for kurtosis, _ in found.values()) > 50
    assert max(kurtosis for kurtosis, _ in usual.values()) < 10
