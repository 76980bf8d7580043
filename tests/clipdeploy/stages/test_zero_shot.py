"""``export --zero-shot``: a CLIP and class texts become a graph that the other stages judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from clip_files import write_clip
from verify_command import run

from clipdeploy.core.errors import CheckpointError, UsageError
from clipdeploy.core.passport import ModelChoices
from clipdeploy.models import cards
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.load import WeightsChoice, ZeroShot
from clipdeploy.pipeline import (
    Expected,
    VerifyScope,
    calibrate_model,
    convert_model,
    verify_model,
)
from clipdeploy.stages.export import export_model
from clipdeploy.stages.quantize import quantize_model
from clipdeploy.stages.zero_shot import prepare_weights
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph

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


DEMO = cards.demo_file("clip")
DEMO_MODEL = "vit-p4-32px-w96-d6-h6-e32"


def demo_choice(classes: Path) -> WeightsChoice:
    return WeightsChoice(DEMO, zero_shot=ZeroShot(classes, DEMO / "templates.txt"))


def test_the_demos_int8_classifier_is_equivalent(tmp_path: Path) -> None:
    workspace, notes = Workspace(tmp_path / "artifacts"), list[str]()
    made = export_model(workspace, None, demo_choice(DEMO / "digits.txt"), note=notes.append)
    assert f"model: {DEMO_MODEL} (inferred from {DEMO}: a zero-shot classifier)" in notes
    passport = made.passport
    assert passport.class_names == tuple(map(str, range(10)))
    assert passport.weights.zero_shot is not None
    assert passport.weights.zero_shot.checkpoint == str(DEMO / "model.safetensors")
    assert len(passport.weights.zero_shot.templates) == 4
    assert not export_model(workspace, None, demo_choice(DEMO / "digits.txt")).changed
    # The classifier is a checkpoint of its own: without another, the workspace's is taken.
    assert not export_model(workspace, DEMO_MODEL).changed
    # CLIP's tail: the projection, the length, the quotient and the head.
    nodes = [node.op_type for node in load_graph(made.path).graph]
    assert nodes[-4:] == ["Gemm", "ReduceL2", "Div", "Gemm"]

    calibrate_model(workspace, DEMO_MODEL, cards.demo_file("calibration.zip"))
    int8 = quantize_model(workspace, DEMO_MODEL).artifact
    half = convert_model(workspace, DEMO_MODEL)
    scope = VerifyScope(artifacts=(half.path, int8.path), expected=Expected.parse("99.2"))
    judged = verify_model(workspace, DEMO_MODEL, cards.demo_file("test.zip"), scope=scope)
    assert judged
    assert judged.verification is not None
    reference = judged.verification.reference
    assert reference is not None
    for row in judged.verification.rows:
        assert row.fidelity is not None
        assert row.fidelity.accuracy is not None
        # Points of top-1.
        assert abs(row.fidelity.accuracy.top1 - reference.top1) <= 0.3


def test_texts_in_the_wrong_order_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdeploy.verification.diagnosis._SAMPLE", 40)
    lines = (DEMO / "digits.txt").read_text().splitlines()
    words = [line.partition("\t")[2] for line in lines]
    classes = tmp_path / "turned.txt"
    classes.write_text("\n".join(f"{i}\t{words[(i + 1) % 10]}" for i in range(10)))
    workspace = Workspace(tmp_path / "artifacts")
    made = export_model(workspace, None, demo_choice(classes))
    scope = VerifyScope(artifacts=(made.path,), limit=100)
    judged = verify_model(workspace, DEMO_MODEL, cards.demo_file("test.zip"), scope=scope)
    assert not judged
    assert judged.verification is not None
    assert judged.verification.baseline.status == "implausible"


def test_a_published_clip_with_own_texts_is_not_compared(tmp_path: Path) -> None:
    """It is recognised by its place, and its accuracy is one of other texts."""
    published = tmp_path / "models--openai--clip-vit-base-patch16" / "snapshots" / "1"
    shutil.copytree(DEMO, published)
    choice = WeightsChoice(
        published, zero_shot=ZeroShot(DEMO / "digits.txt", DEMO / "templates.txt")
    )
    workspace = Workspace(tmp_path / "artifacts")
    made = export_model(workspace, None, choice)
    scope = VerifyScope(artifacts=(made.path,), limit=40)
    judged = verify_model(workspace, DEMO_MODEL, cards.demo_file("test.zip"), scope=scope)
    assert judged.verification is not None
    baseline = judged.verification.baseline
    assert (baseline.status, baseline.published_top1) == ("unpublished", None)
    assert "of openai/clip-vit-base-patch16 is published for ImageNet's" in baseline.sentence


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
    "no checkpoint": (lambda choice: replace(choice, checkpoint=None), "needs the checkpoint"),
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


# --- embedding models


def test_a_name_with_an_owner_is_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path / "home"))
    choice = WeightsChoice(embedding="normalised", offline=True)
    with pytest.raises(CheckpointError, match="hf://owner/clip"):
        prepare_weights(Workspace(tmp_path), "owner/clip", choice, lambda text: None)


def test_embeddings_need_a_clip(tmp_path: Path, classes: Path) -> None:
    workspace = Workspace(tmp_path)
    with pytest.raises(UsageError, match="an embedding model needs the checkpoint of a CLIP"):
        prepare(workspace, WeightsChoice(embedding="raw"))
    with pytest.raises(UsageError, match="an embedding model has no classes"):
        prepare(workspace, WeightsChoice(DEMO, embedding="raw", class_names=classes))
    digits = cards.demo_file("weights.safetensors")
    with pytest.raises(CheckpointError, match="is a classifier with a head of its own"):
        prepare(workspace, WeightsChoice(digits, embedding="raw"))


def test_an_embedding_model_is_exported_again_by_its_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first = export_model(workspace, None, WeightsChoice(DEMO, embedding="raw"))
    assert first.passport.model == f"{DEMO_MODEL}-raw"
    assert first.passport.output.name == "embedding"
    assert first.passport.class_names == ()
    again = export_model(workspace, first.passport.model)
    assert not again.changed
    with pytest.raises(UsageError, match="has the output raw, not normalised"):
        export_model(workspace, first.passport.model, WeightsChoice(DEMO, embedding="normalised"))
