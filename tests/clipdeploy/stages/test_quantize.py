"""Quantising a model: what is reused, what is refused, and in which form.

Covers: clipdeploy/stages/build.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from verify_command import run

from calibration.config import QuantizeConfig
from calibration.recipe import QuantizeRecipe, save_recipe
from calibration.scheme import SchemeConfig
from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.engines import backends
from clipdeploy.engines.backends import BackendOption, choose_backend, scale_forms
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models import cards
from clipdeploy.stages.build import build_model
from clipdeploy.stages.deploy.config import DeployConfig
from clipdeploy.stages.quantize import (
    _judged,
    chosen_config,
    model_quality,
    quantize_model,
    recipe_config,
    with_scale_form,
)
from clipdeploy.workspace.folder import Workspace
from exporters.samples import Samples


@pytest.fixture
def calibrated(demo_workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the demo's workspace, to change its INT8 graphs."""
    shutil.copytree(demo_workspace.root, tmp_path / "copy")
    return Workspace(tmp_path / "copy")


def test_float16_is_judged_on_calibration_images_where_there_are_some(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    _, passport = demo_workspace.source(cards.DEMO)
    judged = _judged(demo_workspace, cards.DEMO, passport)
    assert isinstance(judged, Samples)
    # Eight of the calibration, then three of the package.
    assert len(judged.crops) == 11
    bare = Workspace(tmp_path)
    bare.folder(cards.DEMO).mkdir(parents=True)
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), bare.folder(cards.DEMO))
    alone = _judged(bare, cards.DEMO, passport)
    assert isinstance(alone, Samples)
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
        ({"format": "fp8"}, "tensorrt", "tensor"),
        ({"format": "fp8"}, "tensorrt-rtx", "tensor"),
        ({"format": "fp8", "weight_scales": "ratio"}, "tensorrt-rtx", "ratio"),
    ],
)
def test_the_backend_chooses_the_form_of_the_weight_scales(
    asked: dict[str, Any], backend: BackendOption, form: str
) -> None:
    assert with_scale_form(QuantizeConfig(**asked), backend).weight_scales == form


def test_auto_is_the_form_of_the_backend_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = scale_forms(choose_backend("auto").backend)[0]
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


def test_the_other_effort_is_another_graph(calibrated: Workspace) -> None:
    best = QuantizeConfig(("blocks.[1-5].*",), scheme=SchemeConfig(strength=0.65), effort="best")
    for config in (best, replace(best, effort="fast")):
        assert quantize_model(calibrated, cards.DEMO, config).artifact.changed
        again = quantize_model(calibrated, cards.DEMO, config)
        assert not again.artifact.changed
        assert again.artifact.passport.settings.get("effort", "fast") == config.effort


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
        assert chosen_config(workspace, cards.DEMO) == config
        # The command that `build-engine` prints for the wrong form keeps the search's choice.
        asked = QuantizeConfig(weight_scales="ratio")
        found = chosen_config(workspace, cards.DEMO, asked)
        assert found == replace(config, weight_scales="ratio")
    quantize_model(workspace, cards.DEMO)
    assert chosen_config(workspace, cards.DEMO) == QuantizeConfig()


def searched(workspace: Workspace, remainder: Literal["fp16", "fp32"]) -> QuantizeConfig:
    """The INT8 graph and the recipe that a search leaves."""
    config = QuantizeConfig(("blocks.0.*",), remainder, min_sqnr=None)
    made = quantize_model(workspace, cards.DEMO, config).artifact
    recipe = QuantizeRecipe(cards.DEMO, made.passport.weights.identity, config, {})
    save_recipe(recipe, workspace.recipe(cards.DEMO))
    return config


@pytest.mark.parametrize("remainder", ["fp16", "fp32"])
def test_the_graph_of_a_search_is_kept(
    remainder: Literal["fp16", "fp32"], calibrated: Workspace
) -> None:
    config = searched(calibrated, remainder)
    at, notes = (calibrated, cards.DEMO), list[str]()
    default = QuantizeConfig(remainder=remainder)
    assert chosen_config(*at, default, note=notes.append) == config
    assert chosen_config(*at, replace(default, min_sqnr=5), note=notes.append) == config
    assert len(notes) == 2
    assert chosen_config(*at, default, force=True) == default
    # Other options, or the graph for other runtimes.
    for asked in (
        QuantizeConfig(("head",), remainder),
        QuantizeConfig(remainder="fp32" if remainder == "fp16" else "fp16"),
    ):
        assert chosen_config(*at, asked, note=notes.append) == asked
    assert len(notes) == 2
    # A graph of later options is not the search's.
    quantize_model(*at, default, force=True)
    assert chosen_config(*at, default) == default


def test_the_command_keeps_the_graph_of_a_search(calibrated: Workspace) -> None:
    searched(calibrated, "fp16")
    graph = calibrated.graph(cards.DEMO, "int8")
    before = graph.read_bytes()
    at = ("--model", "demo", "--workspace", calibrated.root)
    kept = run("quantize", *at)
    assert kept.exit_code == 0
    assert "keeping the INT8 graph of the search" in kept.stderr
    assert "(unchanged)" in kept.stdout
    assert graph.read_bytes() == before
    replaced = run("quantize", "--force", *at)
    assert replaced.exit_code == 0
    assert "keeping" not in replaced.stderr
    assert graph.read_bytes() != before


def test_a_recipe_of_other_weights_is_refused(calibrated: Workspace, tmp_path: Path) -> None:
    config = QuantizeConfig(("blocks.0.*",))
    save_recipe(QuantizeRecipe(cards.DEMO, "other", config, {}), tmp_path / "recipe.json")
    with pytest.raises(ArtifactError):
        recipe_config(calibrated, cards.DEMO, tmp_path / "recipe.json")


@pytest.mark.parametrize(("form", "backend"), [("channel", "tensorrt-rtx"), ("ratio", "tensorrt")])
def test_the_wrong_form_is_refused_before_the_graph_is_made(
    form: Any, backend: Any, calibrated: Workspace
) -> None:
    quantize_model(calibrated, cards.DEMO)
    before = calibrated.graph(cards.DEMO, "int8").read_bytes()
    wrong = QuantizeConfig(weight_scales=form)
    with pytest.raises(UsageError, match=f"{form} form, but this backend needs"):
        build_model(calibrated, cards.DEMO, "int8", BuildConfig(backend), quantize=wrong)
    with pytest.raises(UsageError, match=f"{form} form, but this backend needs"):
        DeployConfig(val="x", calibration="y", quantize=wrong, build=BuildConfig(backend))
    assert calibrated.graph(cards.DEMO, "int8").read_bytes() == before
