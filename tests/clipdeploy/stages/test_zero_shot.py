"""``export --zero-shot``: a CLIP and class texts become a graph that the other stages judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from clip_files import write_clip
from verify_command import run

from calibration.config import QuantizeConfig
from clipdeploy.core.errors import CheckpointError, UsageError
from clipdeploy.core.passport import ModelChoices
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.load import WeightsChoice, ZeroShot
from clipdeploy.pipeline import VerifyScope, calibrate_model, convert_model, verify_model
from clipdeploy.stages.export import export_model
from clipdeploy.stages.quantize import quantize_model
from clipdeploy.stages.zero_shot import prepare_weights
from clipdeploy.workspace.folder import Workspace

MODEL = "vit-p8-32px-w128-d2-h2-e48"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def prepare(workspace: Workspace, choice: WeightsChoice) -> None:
    prepare_weights(workspace, None, choice, lambda text: None)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    path = tmp_path / "classes.txt"
    path.write_text("".join(f"{index}\tthe digit {name}\n" for index, name in enumerate(DIGITS)))
    return path


@pytest.fixture
def choice(classes: Path, tmp_path: Path) -> WeightsChoice:
    return WeightsChoice(
        write_clip("openai", tmp_path / "clip"), zero_shot=ZeroShot(classes, "simple")
    )


def test_all_stages_take_the_classifier(choice: WeightsChoice, tmp_path: Path) -> None:
    workspace, notes = Workspace(tmp_path / "artifacts"), list[str]()
    made = export_model(workspace, None, choice, note=notes.append)
    assert made.changed
    assert f"model: {MODEL} (inferred from {choice.checkpoint}: a zero-shot classifier)" in notes
    passport = made.passport
    assert passport.class_names == tuple(map(str, range(10)))
    assert passport.weights.zero_shot is not None
    assert passport.weights.zero_shot.checkpoint == str(choice.checkpoint)
    assert len(passport.weights.zero_shot.templates) == 7
    assert not export_model(workspace, None, choice).changed
    # The classifier is a checkpoint of its own: CLIP's is no longer needed.
    Path(str(choice.checkpoint)).unlink()
    assert not export_model(workspace, MODEL).changed

    calibrate_model(workspace, MODEL, cards.demo_file("calibration.zip"))
    half, int8 = convert_model(workspace, MODEL), quantize_model(workspace, MODEL, QuantizeConfig())
    scope = VerifyScope(artifacts=(made.path, half.path, int8.artifact.path))
    judged = verify_model(workspace, MODEL, cards.demo_file("test.zip"), scope=scope).verification
    assert judged is not None
    found = [row.fidelity.sqnr_db for row in judged.rows if row.fidelity is not None]
    assert [
        db is not None and db > least for db, least in zip(found, (100, 50, 30), strict=True)
    ] == [True] * 3


def test_other_texts_replace_the_classifier_only_on_request(
    choice: WeightsChoice, classes: Path, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    prepare(workspace, choice)
    made = workspace.zero_shot(MODEL)
    before, origin = made.read_bytes(), read_checkpoint(made).zero_shot
    prepare(workspace, choice)
    assert made.read_bytes() == before
    classes.write_text(classes.read_text().replace("seven", "7"))
    with pytest.raises(UsageError, match="other texts") as caught:
        prepare(workspace, choice)
    assert "--replace-weights" in caught.value.hint
    assert made.read_bytes() == before
    prepare(workspace, replace(choice, replace=True))
    other = read_checkpoint(made).zero_shot
    assert origin is not None
    assert other == replace(origin, prompts_sha256=other.prompts_sha256 if other else "")
    assert other != origin


FAULTS: dict[str, tuple[Callable[[WeightsChoice], WeightsChoice], str]] = {
    "no checkpoint": (lambda choice: replace(choice, checkpoint=None), "no checkpoint"),
    "class names": (lambda choice: replace(choice, class_names="names.txt"), "class texts"),
    "the demo": (
        lambda choice: replace(choice, checkpoint=cards.demo_file("weights.safetensors")),
        "head of its own",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, choice: WeightsChoice, tmp_path: Path) -> None:
    change, message = FAULTS[fault]
    with pytest.raises((UsageError, CheckpointError), match=message):
        export_model(Workspace(tmp_path / "artifacts"), None, change(choice))
    assert not list(tmp_path.glob("artifacts/**/*"))


def test_another_model_is_refused(choice: WeightsChoice, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"makes the model {MODEL}"):
        export_model(Workspace(tmp_path / "artifacts"), cards.DEMO, choice)


def test_an_open_clip_needs_its_gelu(classes: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    choice = WeightsChoice(write_clip("open_clip", tmp_path / "clip"), zero_shot=ZeroShot(classes))
    with pytest.raises(CheckpointError, match="GELU"):
        prepare(workspace, choice)
    prepare(workspace, replace(choice, choices=ModelChoices(gelu="erf")))
    assert read_checkpoint(workspace.zero_shot(MODEL)).choices.gelu == "erf"


def test_the_command(choice: WeightsChoice, classes: Path, tmp_path: Path) -> None:
    words = ["--workspace", str(tmp_path / "artifacts"), "--checkpoint", str(choice.checkpoint)]
    done = run("export", *words, "--zero-shot", str(classes), "--templates", "simple", "--json")
    assert done.exit_code == 0
    weights = json.loads(done.stdout)["passport"]["weights"]
    assert weights["zero_shot"]["templates"][0] == "itap of a {}."
    for extra, message in (
        (["--templates", "simple"], "belongs to --zero-shot"),
        (["--zero-shot", str(classes), "--pooling", "avg"], "exclude each other"),
        (["--zero-shot", str(classes), "--class-names", str(classes)], "exclude each other"),
    ):
        refused = run("export", *words, *extra)
        assert refused.exit_code == 2
        assert message in refused.stderr
