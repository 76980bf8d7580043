"""A workspace keeps its own checkpoint or seed until another one is chosen on purpose."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from deployments import CONFIG
from safetensors.torch import load_file, save_file
from verify_command import run

from clipdeploy.core.errors import ArtifactError, BuildError, UsageError
from clipdeploy.core.passport import ModelChoices, WeightsOrigin
from clipdeploy.engines.compiler import Compiler
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    Workspace,
    calibrate_model,
    convert_model,
    deploy_model,
    export_model,
    quantize_model,
)
from exporters.headers import read_passport

CALIBRATION = cards.demo_file("calibration.zip")


def fine_tuned(path: Path, shift: float = 0.01) -> Path:
    """The demo's weights with other biases in the head."""
    tensors = load_file(cards.demo_file("weights.safetensors"))
    save_file(tensors | {"head.bias": tensors["head.bias"] + shift}, path)
    return path


def weights(workspace: Workspace) -> WeightsOrigin:
    return read_passport(workspace.graph(cards.DEMO, "fp32")).weights


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "artifacts")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only, since the workspace below names it."""
    return fine_tuned(tmp_path_factory.mktemp("checkpoint") / "mine.safetensors")


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The checkpoint, exported.  Read only."""
    workspace = Workspace(tmp_path_factory.mktemp("made") / "artifacts")
    export_model(workspace, cards.DEMO, WeightsChoice(checkpoint))
    return workspace


@pytest.fixture
def exported(made: Workspace, workspace: Workspace) -> Workspace:
    """The checkpoint, exported into a workspace that may be changed."""
    shutil.copytree(made.root, workspace.root)
    return workspace


@pytest.mark.parametrize("own", ["checkpoint", "seed", "resized", "choices"])
def test_exporting_again_keeps_the_weights(own: str, workspace: Workspace, tmp_path: Path) -> None:
    file = fine_tuned(tmp_path / "mine.safetensors")
    if own == "resized":
        tensors = load_file(file)
        small = tensors["pos_embed"][:, :50].contiguous()
        save_file(tensors | {"pos_embed": small}, file)
    choice = WeightsChoice(random_seed=7) if own == "seed" else WeightsChoice(file)
    if own == "choices":  # the published weights, read in another way
        published = cards.demo_file("weights.safetensors")
        choice = WeightsChoice(published, choices=ModelChoices(gelu="quick"))
    export_model(workspace, cards.DEMO, replace(choice, resize_position=own == "resized"))
    before = weights(workspace)
    assert not export_model(workspace, cards.DEMO).changed
    result = run("export", "--model", "demo", "--force", "--workspace", workspace.root)
    assert result.exit_code == 0, result.output
    assert before.description in result.stdout
    assert weights(workspace) == before


@pytest.mark.parametrize("gone", ["missing", "damaged"])
def test_weights_are_known_without_the_fp32_graph(gone: str, exported: Workspace) -> None:
    graph = exported.graph(cards.DEMO, "fp32")
    convert_model(exported, cards.DEMO)
    before = weights(exported)
    if gone == "missing":
        graph.unlink()
    else:
        graph.write_bytes(graph.read_bytes()[:1000])
    export_model(exported, cards.DEMO)
    assert weights(exported) == before


def test_deploying_keeps_the_weights(exported: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    before = weights(exported)

    def stop(*args: object) -> None:
        raise BuildError("far enough", hint="")

    monkeypatch.setattr(Compiler, "compile", stop)
    with pytest.raises(BuildError, match="far enough"):
        deploy_model(exported, cards.DEMO, replace(CONFIG, precision="fp32", calibration=None))
    assert weights(exported) == before


@pytest.mark.parametrize("other", ["checkpoint", "seed"])
def test_other_weights_are_refused_and_taken_on_purpose(
    other: str, exported: Workspace, checkpoint: Path, tmp_path: Path
) -> None:
    before = weights(exported)
    second = fine_tuned(tmp_path / "second.safetensors", -0.02)
    choice = WeightsChoice(random_seed=3) if other == "seed" else WeightsChoice(second)
    named = "random weights, seed 3" if other == "seed" else str(second)
    with pytest.raises(UsageError, match="--replace-weights") as error:
        export_model(exported, cards.DEMO, choice, force=True)
    assert str(checkpoint) in str(error.value)
    assert named in str(error.value)
    assert weights(exported) == before

    options = ("--random-init", "3") if other == "seed" else ("--checkpoint", second)
    at = ("--model", "demo", "--workspace", exported.root)
    assert run("export", *at, *options).exit_code == 2
    assert weights(exported) == before
    assert run("export", *at, *options, "--replace-weights").exit_code == 0
    assert named in weights(exported).description
    # Without a choice: the published ones.
    assert run("export", *at, "--replace-weights").exit_code == 0
    assert weights(exported).path == str(cards.demo_file("weights.safetensors"))


def test_published_weights_give_way_to_a_named_checkpoint(
    demo_workspace: Workspace, workspace: Workspace, checkpoint: Path
) -> None:
    shutil.copytree(demo_workspace.root, workspace.root)
    assert export_model(workspace, cards.DEMO, WeightsChoice(checkpoint)).changed


def test_a_checkpoint_that_has_changed_or_is_gone(workspace: Workspace, tmp_path: Path) -> None:
    checkpoint = fine_tuned(tmp_path / "mine.safetensors")
    export_model(workspace, cards.DEMO, WeightsChoice(checkpoint))
    before = weights(workspace)
    kept = shutil.copy(checkpoint, tmp_path / "moved.safetensors")
    fine_tuned(checkpoint, 0.5)
    with pytest.raises(ArtifactError, match="has changed"):
        export_model(workspace, cards.DEMO)
    checkpoint.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        export_model(workspace, cards.DEMO)
    assert weights(workspace) == before
    # As the hint says: the same file from another place is found again.
    assert export_model(workspace, cards.DEMO, WeightsChoice(kept)).changed
    assert weights(workspace).identity == before.identity
    calibrate_model(workspace, cards.DEMO, CALIBRATION)
    assert quantize_model(workspace, cards.DEMO).artifact.passport.weights.path == str(kept)
