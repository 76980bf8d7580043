"""A reference proven by its accuracy, and everything that must not count as such a proof.

Covers: clipdeploy/stages/verify/remember.py.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from deployments import QUICK
from judging import each_once
from pages import read_page
from pixel_changes import change_source
from safetensors.torch import load_file, save_file

from clipdeploy.cli.main import main
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    Expected,
    Judgement,
    VerifyConfig,
    VerifyScope,
    Workspace,
    convert_model,
    deploy_model,
    export_model,
    inspect_file,
    merge_verification,
    package_cpp,
    package_triton,
    verify_model,
    write_reports,
)
from clipdeploy.stages.deploy.deployment import Packages, open_points
from clipdeploy.verification.result import BaselineStatus
from clipdeploy.workspace import proof
from clipdeploy.workspace.proof import PROOF_FILE, Means, ReferenceProof, reference_proof
from exporters.headers import read_passport

TEST = cards.demo_file("test.zip")
CONFIG = VerifyConfig(batch=50, workers=0, threads=1)
# Enough of the 500 digits to notice a reference 5.5 points worse, where 99.0 or 99.4 % are stated.
ENOUGH, FEW = 150, 60


def graph(workspace: Workspace) -> Path:
    return workspace.graph(cards.DEMO, "fp32")


def record(workspace: Workspace) -> Path:
    return workspace.folder(cards.DEMO) / PROOF_FILE


def proven(workspace: Workspace) -> ReferenceProof:
    return reference_proof(graph(workspace), read_passport(graph(workspace)))


def verified(workspace: Workspace, data: Path = TEST, **options: Any) -> Judgement:
    """Verify the FP32 graph alone; ``options`` are those of the scope, ``note`` and ``shard``."""
    note = options.pop("note", lambda text: None)
    config = replace(CONFIG, shard=options.pop("shard", None))
    scope = VerifyScope(graphs_only=True, **options)
    return verify_model(workspace, cards.DEMO, data, config, scope, note=note)


def shown(judgement: Judgement) -> ReferenceProof:
    assert judgement.verification is not None
    assert judgement.verification.reference_proof is not None
    return judgement.verification.reference_proof


def status(judgement: Judgement) -> str:
    assert judgement.verification is not None
    return judgement.verification.baseline.status


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module", autouse=True)
def _each_once() -> Iterator[None]:
    """Repeated calls are tested in tests/clipdeploy/verification."""
    with each_once():
        yield


@pytest.fixture(autouse=True)
def _small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """The causes of a failed baseline are tested in tests/clipdeploy/verification."""
    monkeypatch.setattr("clipdeploy.verification.diagnosis._SAMPLE", 40)


@pytest.fixture(scope="module")
def exported(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo, exported.  Read only."""
    workspace = Workspace(tmp_path_factory.mktemp("exported") / "artifacts")
    workspace.folder(cards.DEMO).mkdir(parents=True)
    shutil.copy(graph(demo_workspace), graph(workspace))
    return workspace


@pytest.fixture(scope="module")
def confirmation(
    exported: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Judgement]:
    """The same with a verification that confirms the card's accuracy.  Read only."""
    workspace = Workspace(tmp_path_factory.mktemp("confirmed") / "artifacts")
    shutil.copytree(exported.root, workspace.root)
    judged = verified(workspace, limit=ENOUGH)
    assert status(judged) == "confirmed"
    return workspace, judged


@pytest.fixture(scope="module")
def confirmed(confirmation: tuple[Workspace, Judgement]) -> Workspace:
    return confirmation[0]


@pytest.fixture
def fresh(exported: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(exported.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


@pytest.fixture
def remembered(confirmed: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(confirmed.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test digits, each in the folder of the next class."""
    folder = tmp_path_factory.mktemp("shuffled")
    with zipfile.ZipFile(TEST) as archive:
        for name in archive.namelist():
            digit, _, rest = name.partition("/")
            if rest:
                path = folder / str((int(digit) + 1) % 10) / rest
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(archive.read(name))
    return folder


# --- what proves it


def test_a_confirmed_accuracy_is_remembered(exported: Workspace, confirmed: Workspace) -> None:
    assert proven(exported) == ReferenceProof()
    found = proven(confirmed)
    assert found.by == ("published accuracy",)
    assert found.problem == ""
    assert found.accuracy is not None
    assert (found.accuracy.images, found.accuracy.stated_top1) == (ENOUGH, 99.4)
    assert found.accuracy.interval[0] < found.accuracy.top1 <= found.accuracy.interval[1]
    assert sha256_file(graph(confirmed)) == sha256_file(graph(exported))


def test_every_command_shows_it(remembered: Workspace, tmp_path: Path) -> None:
    sentence = proven(remembered).sentence
    assert sentence.startswith("proven by published accuracy: top-1 is ")
    # Fewer images confirm nothing, and take nothing back.
    judged = verified(remembered, limit=FEW)
    assert status(judged) == "unconfirmed"
    assert shown(judged) == proven(remembered)
    write_reports(judged, [tmp_path / "a.md", tmp_path / "a.json"])
    assert f"the reference is {sentence}" in (tmp_path / "a.md").read_text()
    assert f"| reference's proof | {sentence} |" in (tmp_path / "a.md").read_text()
    reported = json.loads((tmp_path / "a.json").read_text())["reference_proof"]
    assert reported["by"] == ["published accuracy"]
    assert inspect_file(graph(remembered)).reference == proven(remembered)
    table = " ".join(run("inspect", graph(remembered)).stdout.split())
    assert "reference proven by published accuracy: top-1 is" in table
    again = run("export", "--model", "demo", "--workspace", remembered.root)
    assert f"reference: {sentence}" in again.stdout
    for words in (("--triton", tmp_path / "repository"), ("--cpp", tmp_path / "program")):
        packaged = run("package", graph(remembered), *words)
        assert f"  reference  {sentence}" in packaged.stdout


def about_pytorch(points: Sequence[str]) -> list[str]:
    return [point for point in points if point.startswith("PyTorch's own accuracy")]


def test_a_deployment_on_few_images_lists_only_an_unproven_reference(
    remembered: Workspace,
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    config = replace(QUICK, precision="fp16", calibration=None, beside=())
    proven_one = deploy_model(remembered, cards.DEMO, config)
    assert proven_one.verification.baseline.status == "unconfirmed"
    assert about_pytorch(proven_one.open_points) == []
    assert proven(remembered).sentence in " ".join(
        read_page(proven_one.page.read_text()).text.split()
    )
    assert proven_one.packages.triton is not None
    assert proven_one.packages.triton.reference == proven(remembered)
    record(remembered).unlink()
    (point,) = about_pytorch(deploy_model(remembered, cards.DEMO, config).open_points)
    assert "baseline unconfirmed" in point


@pytest.mark.parametrize(
    ("status", "by", "count"),
    [
        ("unpublished", (), 1),
        ("unpublished", ("probe",), 0),
        # It says nothing about the labels.
        ("unconfirmed", ("probe",), 1),
        ("missed", ("probe",), 1),
        ("confirmed", (), 0),
    ],
)
def test_a_probe_replaces_an_accuracy_that_is_not_published(
    status: BaselineStatus,
    by: tuple[Means, ...],
    count: int,
    confirmation: tuple[Workspace, Judgement],
) -> None:
    found = confirmation[1].verification
    assert found is not None
    judged = replace(
        found,
        baseline=replace(found.baseline, status=status),
        reference_proof=ReferenceProof(by),
    )
    assert len(about_pytorch(open_points(judged, (), None, Packages()))) == count


def test_other_precisions_have_the_reference_of_their_source(remembered: Workspace) -> None:
    half = convert_model(remembered, cards.DEMO)
    assert reference_proof(half.path, half.passport) == proven(remembered)


def test_a_package_has_the_proof_beside_its_artifact(remembered: Workspace, tmp_path: Path) -> None:
    for made in (
        package_triton(graph(remembered), tmp_path / "repository"),
        package_cpp(graph(remembered), tmp_path / "program"),
    ):
        assert made.reference == proven(remembered)
        assert inspect_file(made.model).reference == proven(remembered)
    record(remembered).unlink()
    for made in (
        package_triton(graph(remembered), tmp_path / "repository"),
        package_cpp(graph(remembered), tmp_path / "program"),
    ):
        assert made.reference == ReferenceProof()
        assert not made.model.with_name(PROOF_FILE).exists()


def test_shards_that_are_merged_prove_it(fresh: Workspace, confirmed: Workspace) -> None:
    for part in (1, 2):
        verified(fresh, limit=ENOUGH, shard=(part, 2))
        assert not record(fresh).exists()
    merged = merge_verification(fresh, cards.DEMO)
    assert shown(merged) == proven(fresh) == proven(confirmed)


def test_an_accuracy_that_the_user_expects_is_not_called_published(fresh: Workspace) -> None:
    judged = verified(fresh, limit=ENOUGH, expected=Expected("user", 99.0))
    assert status(judged) == "confirmed"
    assert shown(judged).by == ("expected accuracy",)
    sentence = shown(judged).sentence
    assert sentence.startswith("proven by the accuracy that you expected, not by a published one")
    assert "99.00 % was expected" in sentence
    # The published accuracy is the stronger proof, and is not replaced by the other.
    assert shown(verified(fresh, limit=ENOUGH)).by == ("published accuracy",)
    judged = verified(fresh, limit=ENOUGH, expected=Expected("user", 99.0))
    assert shown(judged).by == ("published accuracy",)


def test_the_same_accuracy_keeps_its_date(remembered: Workspace) -> None:
    old = json.loads(record(remembered).read_text())
    record(remembered).write_text(json.dumps(old | {"date": "2020-02-29"}))
    found = shown(verified(remembered, limit=ENOUGH)).accuracy
    assert found is not None
    assert found.date == "2020-02-29"


def test_a_probe_and_an_accuracy_are_both_named(confirmed: Workspace) -> None:
    passport = read_passport(graph(confirmed))
    probed = replace(passport, weights=replace(passport.weights, probed=True))
    found = reference_proof(graph(confirmed), probed)
    assert found.by == ("probe", "published accuracy")
    assert "your framework; proven by published accuracy" in found.sentence


# --- what does not


def test_too_few_images_prove_nothing(fresh: Workspace) -> None:
    judged = verified(fresh, limit=FEW)
    assert status(judged) == "unconfirmed"
    assert shown(judged) == ReferenceProof()
    assert not record(fresh).exists()


def test_labels_in_another_order_prove_nothing(fresh: Workspace, shuffled: Path) -> None:
    judged = verified(fresh, shuffled, limit=ENOUGH)
    assert status(judged) == "implausible"
    assert shown(judged) == ReferenceProof()
    assert not record(fresh).exists()


def test_a_comparison_that_was_not_made_proves_nothing(fresh: Workspace) -> None:
    assert shown(verified(fresh, limit=ENOUGH, expected=Expected("none"))) == ReferenceProof()


@pytest.mark.parametrize("expected", [Expected(), Expected("none"), Expected("user", 99.0)])
def test_a_contradiction_removes_the_proof(
    expected: Expected, remembered: Workspace, shuffled: Path
) -> None:
    said: list[str] = []
    judged = verified(remembered, shuffled, limit=ENOUGH, expected=expected, note=said.append)
    assert shown(judged).by == ()
    assert "which contradicts the 99.40 % confirmed on 20" in shown(judged).problem
    assert any(text.startswith("the reference is no longer proven: top-1 is ") for text in said)
    assert not record(remembered).exists()
    assert proven(remembered) == ReferenceProof()


def test_the_first_look_at_many_images_removes_it_too(
    remembered: Workspace, shuffled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdeploy.stages.verify.run._LONG", ENOUGH)
    judged = verified(remembered, shuffled)
    assert judged.results is None
    assert "contradicts" in shown(judged).problem
    assert not record(remembered).exists()


def test_a_wrong_expectation_is_no_contradiction(remembered: Workspace) -> None:
    judged = verified(remembered, limit=ENOUGH, expected=Expected("user", 50.0))
    assert status(judged) == "missed"
    assert shown(judged).by == ("published accuracy",)


def other_weights(workspace: Workspace) -> None:
    tensors = load_file(cards.demo_file("weights.safetensors"))
    path = workspace.root / "mine.safetensors"
    save_file(tensors | {"head.bias": tensors["head.bias"] + 0.01}, path)
    export_model(workspace, cards.DEMO, WeightsChoice(path, replace=True))


def other_crop(workspace: Workspace) -> None:
    export_model(workspace, cards.DEMO, recipe=Recipe(crop_pct=0.9))


@pytest.mark.parametrize(
    ("change", "named"), [(other_weights, "weights"), (other_crop, "recipe, preprocessing")]
)
def test_another_reference_under_the_same_name_is_not_proven(
    change: Callable[[Workspace], None], named: str, remembered: Workspace
) -> None:
    assert proven(remembered).by
    change(remembered)
    found = proven(remembered)
    assert (found.by, found.accuracy) == ((), None)
    assert found.problem.startswith(f"{record(remembered)} is of a reference with other {named}")
    assert found.sentence == f"not proven: {found.problem}"


def test_class_names_in_another_order_are_another_reference(confirmed: Workspace) -> None:
    passport = read_passport(graph(confirmed))
    reordered = replace(passport, class_names=passport.class_names[::-1])
    assert "other class names" in reference_proof(graph(confirmed), reordered).problem


@pytest.mark.parametrize("changed", ["code", "pixels", "PyTorch", "card"])
def test_what_else_decides_the_answers_is_compared(
    changed: str, confirmed: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "code":
        change_source("clipdeploy.models.vit", monkeypatch, tmp_path)
    elif changed == "pixels":
        change_source("clipdeploy.imaging.preprocess", monkeypatch, tmp_path)
    elif changed == "PyTorch":
        monkeypatch.setattr(proof, "library_versions", lambda: {"torch": "0.0.0"})
    else:
        card = replace(cards.find(cards.DEMO), top1=99.9)
        monkeypatch.setattr(cards, "full_card", lambda name: card)
    found = proven(confirmed)
    assert found.by == ()
    assert {"pixels": "image decoder"}.get(changed, changed) in found.problem


def edited(**values: object) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
        (edited(schema=2), "was written by a newer clipdeploy"),
        (edited(top1=50.0), "interval is"),
        (edited(stated_top1=90.0), "interval is"),
        (edited(top1="99.4"), "cannot be read"),
        (edited(interval=[0, 200, 3]), "cannot be read"),
        (edited(date="yesterday"), "date is"),
        (edited(data="a\x1b[2Jb"), "data is"),
        (edited(decides={}), "is of a reference with other weights"),
        (as_folder, "is a directory"),
        (as_pipe, "is a pipe"),
    ],
)
def test_a_damaged_file_is_named_and_proves_nothing(
    damage: Callable[[Path], None], words: str, remembered: Workspace
) -> None:
    damage(record(remembered))
    found = proven(remembered)
    assert found.by == ()
    assert PROOF_FILE in found.problem
    assert words.lower() in found.problem.lower()
    result = run("inspect", graph(remembered))
    assert result.exit_code == 0
    assert "not proven: " in " ".join(result.stdout.split())


def test_a_damaged_file_is_replaced_by_the_next_confirmation(remembered: Workspace) -> None:
    record(remembered).write_bytes(b"{")
    assert shown(verified(remembered, limit=ENOUGH)).by == ("published accuracy",)


def test_random_weights_and_embeddings_have_no_accuracy(
    tmp_path: Path, towers: Workspace, confirmed: Workspace
) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    export_model(workspace, cards.DEMO, WeightsChoice(random_seed=1))
    assert shown(verified(workspace, limit=FEW)) == ReferenceProof()
    embedder = next(towers.root.glob("vit-*/fp32.onnx"))
    assert inspect_file(embedder).reference == ReferenceProof()
