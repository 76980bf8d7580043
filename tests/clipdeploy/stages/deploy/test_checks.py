"""Bad input to a deployment is refused before anything is made.

Covers: clipdeploy/imaging/overlap.py, clipdeploy/stages/deploy/config.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from deployments import CALIBRATION, CONFIG, QUICK, TEST, copied

from clipdeploy.core.errors import (
    ArtifactError,
    ClipdeployError,
    DatasetError,
    FileError,
    UsageError,
)
from clipdeploy.imaging import Labelling, open_images
from clipdeploy.imaging.overlap import shared_images
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    BuildConfig,
    CalibrateConfig,
    DeployConfig,
    VerifyScope,
    Workspace,
    deploy_model,
)

pytestmark = pytest.mark.usefixtures("tensorrt_rtx")


def no_val(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, val=tmp_path / "nothing")


def no_calibration(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, calibration=tmp_path / "nothing")


def none_named(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, calibration=None)


def one_shared(tmp_path: Path) -> DeployConfig:
    val = copied(TEST, tmp_path / "val", 2)
    spy = copied(CALIBRATION, tmp_path / "calibration", 3)
    shutil.copy(next((spy / "4").iterdir()), val / "4" / "under_another_name.png")
    return replace(CONFIG, val=val, calibration=spy)


def one_broken(tmp_path: Path) -> DeployConfig:
    val = copied(TEST, tmp_path / "val", 2)
    (val / "3" / "broken.png").write_bytes(b"\x89PNG and no more")
    return replace(CONFIG, val=val)


def file_in_the_way(tmp_path: Path) -> DeployConfig:
    (tmp_path / "file").write_text("in the way")
    return replace(CONFIG, triton=tmp_path / "file" / "models")


def another_folder(tmp_path: Path) -> DeployConfig:
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "thesis.txt").write_text("not to be lost")
    return replace(CONFIG, cpp=tmp_path / "program")


def no_recipe(tmp_path: Path) -> DeployConfig:
    return replace(CONFIG, quantize_recipe=tmp_path / "recipe.json")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (no_val, DatasetError, ("does not exist", "--val-data")),
        (no_calibration, DatasetError, ("does not exist", "--calibration-data")),
        (none_named, UsageError, ("without calibration images", "--calibration-data")),
        (
            one_shared,
            DatasetError,
            ("would be calibrated on: 4/under_another_name.png", "remove them from"),
        ),
        (one_broken, DatasetError, ("3/broken.png", "--skip-unreadable")),
        (file_in_the_way, FileError, ("models", "is a file, not a folder")),
        (another_folder, ArtifactError, ("program has other files in it",)),
        (no_recipe, FileError, ("cannot read", "recipe.json")),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    bad: Callable[[Path], DeployConfig],
    error: type[ClipdeployError],
    words: tuple[str, ...],
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    with pytest.raises(error) as caught:
        deploy_model(workspace, cards.DEMO, bad(tmp_path))
    for word in words:
        assert word in str(caught.value)
    assert not workspace.graph(cards.DEMO, "fp32").exists()


def test_images_without_labels_are_refused_before_the_calibration(
    workspace: Workspace, tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in copied(TEST, tmp_path / "val", 1).rglob("*.png"):
        shutil.copy(image, flat / f"{image.parent.name}_{image.name}")
    workspace.calibration(cards.DEMO).unlink()
    for asked, said in (
        ("auto", "no labels found"),
        ("none", "have a label, which a verdict needs"),
    ):
        scope = VerifyScope(labelling=Labelling(layout=asked))  # type: ignore[arg-type]
        with pytest.raises(DatasetError, match=said):
            deploy_model(workspace, cards.DEMO, replace(QUICK, val=flat, scope=scope))
    assert not workspace.calibration(cards.DEMO).exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"precision": "fp16"}, "--calibration-data belongs to --int8"),
        ({"precision": "int8-cpu", "benchmark": None}, "engines cannot be built in int8-cpu"),
        ({"package": False, "cpp": Path("x")}, "but a folder for it was given"),
        ({"calibrate": CalibrateConfig(shard=(1, 2))}, "a single shard has no verdict"),
        ({"build": BuildConfig(strip_weights=True)}, "without weights cannot be packaged"),
    ],
)
def test_choices_that_do_not_go_together(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        replace(CONFIG, calibration=CALIBRATION, **wrong)


def test_an_engine_without_weights_may_be_deployed_without_a_package() -> None:
    assert replace(CONFIG, build=BuildConfig(strip_weights=True), package=False)


def test_shared_images_are_found_by_their_bytes(tmp_path: Path) -> None:
    config = one_shared(tmp_path)
    assert config.calibration is not None
    observed, judging = open_images(config.calibration), open_images(config.val)
    assert shared_images(observed, judging) == ("4/under_another_name.png",)
    assert shared_images(open_images(CALIBRATION), open_images(TEST)) == ()
    # A folder and an archive of the same images.
    assert len(shared_images(observed, open_images(CALIBRATION))) == len(observed.entries)
