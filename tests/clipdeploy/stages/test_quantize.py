from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from calibration.qdq import QuantizeConfig
from calibration.recipe import QuantizeRecipe, save_recipe
from clipdeploy.engines import backends
from clipdeploy.engines.backends import BackendOption, choose_backend, scale_form
from clipdeploy.models import cards
from clipdeploy.stages.quantize import (
    _judged_images,
    config_to_build,
    model_quality,
    quantize_model,
    with_scale_form,
)
from clipdeploy.workspace.folder import Workspace


def test_float16_is_judged_on_calibration_images_where_there_are_some(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    _, passport = demo_workspace.source(cards.DEMO)
    judged = _judged_images(demo_workspace, cards.DEMO, passport.preprocess)
    # Eight of the calibration, then three of the package.
    assert len(judged.crops) == 11
    bare = Workspace(tmp_path)
    bare.folder(cards.DEMO).mkdir(parents=True)
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), bare.folder(cards.DEMO))
    alone = _judged_images(bare, cards.DEMO, passport.preprocess)
    assert (alone.crops == judged.crops[8:]).all()
    assert model_quality(bare, cards.DEMO) is None


def test_the_demos_int8_graph_is_sound(demo_workspace: Workspace) -> None:
    quality = model_quality(demo_workspace, cards.DEMO)
    assert quality is not None
    assert quality.sqnr_db is not None
    # Measured 43 dB; what is warned about begins at 20.
    assert quality.sqnr_db > 38
    assert (quality.images, quality.warnings) == (8, ())


@pytest.mark.parametrize(
    ("asked", "backend", "form"),
    [
        ({}, "tensorrt", "channel"),
        ({}, "tensorrt-rtx", "ratio"),
        ({"weight_scales": "channel"}, "tensorrt-rtx", "channel"),
        ({"weight_scales": "ratio"}, "tensorrt", "ratio"),
        # ONNX Runtime's int8 kernels, whatever TensorRT there is.
        ({"remainder": "fp32"}, "tensorrt-rtx", "channel"),
    ],
)
def test_the_backend_chooses_the_form_of_the_weight_scales(
    asked: dict[str, Any], backend: BackendOption, form: str
) -> None:
    assert with_scale_form(QuantizeConfig(**asked), backend).weight_scales == form


def test_auto_is_the_form_of_the_backend_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scale_form(choose_backend("auto").backend)
    assert with_scale_form(QuantizeConfig()).weight_scales == wanted
    monkeypatch.setattr(backends, "is_installed", lambda backend: False)
    assert with_scale_form(QuantizeConfig()).weight_scales == "channel"


def test_another_form_is_another_graph(demo_workspace: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    shutil.copytree(demo_workspace.folder(cards.DEMO), workspace.folder(cards.DEMO))
    ratio = quantize_model(workspace, cards.DEMO, backend="tensorrt-rtx")
    assert not ratio.artifact.changed
    assert ratio.artifact.passport.settings["weight_scales"] == "ratio"
    channel = quantize_model(workspace, cards.DEMO, backend="tensorrt")
    assert channel.artifact.changed
    assert channel.artifact.passport.settings["weight_scales"] == "channel"


def test_a_searched_graph_stays_searched_in_the_other_form(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    shutil.copytree(demo_workspace.folder(cards.DEMO), workspace.folder(cards.DEMO))
    config = QuantizeConfig(exclude=("blocks.0.*",))
    weights = workspace.source(cards.DEMO)[1].weights.identity
    save_recipe(QuantizeRecipe(cards.DEMO, weights, config), workspace.recipe(cards.DEMO))
    for backend in ("tensorrt", "tensorrt-rtx"):
        quantize_model(workspace, cards.DEMO, config, backend=backend)  # type: ignore[arg-type]
        assert config_to_build(workspace, cards.DEMO) == config
    quantize_model(workspace, cards.DEMO)
    assert config_to_build(workspace, cards.DEMO) == QuantizeConfig()
