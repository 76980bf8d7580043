"""Calibration as a user runs it: killed, resumed, in shards, and never on verification images.

Covers: clipdeploy/stages/calibrate.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from demo_variants import write_digits
from demo_workspaces import few_digits
from forked_runs import killed_runs
from PIL import Image

from calibration.table import CalibrationImageRecord, Finding, load_table, save_table
from clipdeploy.cli.main import main
from clipdeploy.core.locks import sole_writer
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images
from clipdeploy.imaging.fingerprints import fingerprint
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

CALIBRATION = str(cards.demo_file("calibration.zip"))
TEST = str(cards.demo_file("test.zip"))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    """A workspace that may be changed, with the FP32 graph alone."""
    folder = tmp_path / "artifacts" / cards.DEMO
    folder.mkdir(parents=True)
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), folder)
    return tmp_path / "artifacts"


def table(artifacts: Path) -> Path:
    return artifacts / cards.DEMO / "calibration.json"


def calibrate(artifacts: Path, *words: str) -> Result:
    at = ("--model", "demo", "--workspace", artifacts)
    return run("calibrate", "--data", CALIBRATION, *at, *words)


# Saves as often as it can, so that a kill at any moment finds something to go on from.
SLOW = """
import sys
from pathlib import Path
from calibration import collect
from clipdeploy.models import cards
from clipdeploy import pipeline
from clipdeploy.workspace.folder import Workspace

collect.CollectConfig.__init__.__defaults__ = (None, 0.0, None, 0)

def run():
    workspace, few = Workspace(Path(sys.argv[1])), pipeline.CalibrateConfig(images=24)
    pipeline.calibrate_model(workspace, cards.DEMO, Path(sys.argv[2]), few)
"""


def test_killed_at_six_moments_and_resumed(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "24").exit_code == 0
    unbroken = table(artifacts).read_bytes()
    table(artifacts).unlink()
    partial = table(artifacts).with_suffix(".partial")
    words, resumed = (str(artifacts), CALIBRATION), 0
    for code in killed_runs(SLOW, *words, partial=partial, times=6, seed=4, delay=0.1):
        assert code in (0, -signal.SIGKILL)
        if table(artifacts).exists():
            break
        resumed += partial.exists()
    assert resumed, "no kill came in the middle"
    assert calibrate(artifacts, "--images", "24").exit_code == 0
    assert table(artifacts).read_bytes() == unbroken
    assert not partial.exists()


def test_shards_merged_equal_one_run(artifacts: Path) -> None:
    few = ("--images", "61")
    assert calibrate(artifacts, *few).exit_code == 0
    whole = table(artifacts).read_bytes()
    table(artifacts).unlink()
    for part in ("1/3", "3/3"):
        assert calibrate(artifacts, *few, "--shard", part).exit_code == 0
    missing = run("calibrate", "merge", "--workspace", artifacts, "--model", "demo")
    assert missing.exit_code == 1
    assert "shards [1, 3] of 3, but 1 to 3 are needed" in missing.stderr
    assert calibrate(artifacts, *few, "--shard", "2/3").exit_code == 0
    merged = run("calibrate", "merge", "--workspace", artifacts, "--model", "demo")
    assert merged.exit_code == 0, merged.output
    assert table(artifacts).read_bytes() == whole


def test_the_table_knows_the_pixels_of_its_images(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    wanted = {
        crop.entry.name: (crop.sha256, *fingerprint(crop.pixels))
        for crop in iter_crops(open_images(Path(CALIBRATION)), spec, workers=0)
    }
    images = load_table(table(artifacts)).images
    assert len({image.pixels for image in images}) == 12
    for image in images:
        assert (image.sha256, image.pixels, image.thumbnail) == wanted[image.name]


def test_a_table_without_pixels_is_made_again(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    whole = table(artifacts).read_bytes()
    assert "(unchanged)" in calibrate(artifacts, "--images", "12").output
    found = load_table(table(artifacts))
    bare = tuple(CalibrationImageRecord(image.name, image.sha256) for image in found.images)
    save_table(replace(found, images=bare, schema=2), table(artifacts))
    assert load_table(table(artifacts)).images == found.images
    assert "(unchanged)" not in calibrate(artifacts, "--images", "12").output
    assert table(artifacts).read_bytes() == whole


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "1", "1/0", "-1/3"])
def test_a_shard_that_does_not_exist(shard: str, artifacts: Path) -> None:
    result = calibrate(artifacts, "--shard", shard)
    assert result.exit_code == 2
    assert "shard" in result.stderr


def test_more_images_than_there_are(artifacts: Path) -> None:
    result = calibrate(artifacts, "--images", "201")
    assert result.exit_code == 1
    assert "contains 200 images, 201 are needed" in result.stderr
    assert not table(artifacts).exists()


def test_few_images_are_named_by_every_later_command(artifacts: Path) -> None:
    made = calibrate(artifacts, "--images", "20", "--json")
    assert "only 20 images: use 128 or more" in made.stderr
    (finding,) = json.loads(made.stdout)["findings"]
    assert finding["kind"] == "few"
    assert load_table(table(artifacts)).findings == (Finding(**finding),)
    # The images are not read again, but what was found is.
    assert "only 20 images" in calibrate(artifacts, "--images", "20").stderr
    at = ("--model", "demo", "--workspace", artifacts)
    for _ in range(2):
        assert f"the calibration: {finding['sentence']}" in run("quantize", *at).stderr
    inspected = run("inspect", table(artifacts).with_name("int8.onnx")).stdout
    assert "only 20 images: use 128 or more" in " ".join(inspected.split())


def test_sound_images_have_no_findings(artifacts: Path) -> None:
    # As few as are enough.
    made = calibrate(artifacts, "--images", "128", "--json")
    assert json.loads(made.stdout)["findings"] == []
    assert "only" not in made.stderr
    at = ("--model", "demo", "--workspace", artifacts)
    assert "the calibration:" not in run("quantize", *at).stderr


def test_images_unlike_those_of_the_training_are_named(artifacts: Path, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "negatives", lambda grey: 255 - grey, 40)
    at = ("--model", "demo", "--workspace", artifacts)
    result = run("calibrate", "--data", data, *at)
    assert result.exit_code == 0
    assert "the images look like negatives" in result.stderr
    # A shard has too few of the images to judge them: the merge does.
    for part in ("1/2", "2/2"):
        shard = run("calibrate", "--data", data, "--shard", part, *at)
        assert "negatives" not in shard.stderr
    assert "the images look like negatives" in run("calibrate", "merge", *at).stderr


def test_the_same_picture_in_other_files_is_refused(artifacts: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(CALIBRATION) as archive:
        picture = Image.open(archive.open(sorted(archive.namelist())[0])).resize((64, 64))
        for quality in range(60, 95):
            picture.convert("RGB").save(tmp_path / f"{quality}.jpg", quality=quality)
    result = run("calibrate", "--data", tmp_path, "--model", "demo", "--workspace", artifacts)
    assert result.exit_code == 1
    assert "all 35 images are the same picture" in result.stderr


def test_a_table_of_an_older_version_is_made_again(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    whole = table(artifacts).read_bytes()
    old = replace(load_table(table(artifacts)), schema=4, findings=())
    images = tuple(replace(image, edge=0) for image in old.images)
    save_table(replace(old, images=images), table(artifacts))
    assert not load_table(table(artifacts)).monitored
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    assert table(artifacts).read_bytes() == whole


def test_images_of_one_class_are_refused(artifacts: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(CALIBRATION) as archive:
        fives = [name for name in archive.namelist() if name.startswith("5/")]
        archive.extractall(tmp_path / "fives", fives)
    at = ("--model", "demo", "--workspace", artifacts)
    result = run("calibrate", "--data", tmp_path / "fives", *at)
    assert result.exit_code == 1
    assert "are of one class, 5" in result.stderr
    # Without class folders nobody knows of classes: the same images are accepted.
    assert run("calibrate", "--data", tmp_path / "fives" / "5", *at).exit_code == 0


def test_no_data_is_a_usage_error(artifacts: Path) -> None:
    result = run("calibrate", "--model", "demo", "--workspace", artifacts)
    assert result.exit_code == 2
    assert "--data CALIBRATION_IMAGES" in result.stderr


def test_verification_images_among_the_calibration_images(artifacts: Path, tmp_path: Path) -> None:
    at = ("--model", "demo", "--workspace", artifacts)
    both = few_digits(tmp_path / "both.zip", 2)
    judge = ("verify", "--data", both, "--max-drop", "20")
    assert run("calibrate", "--data", both, *at).exit_code == 0
    assert run("quantize", *at).exit_code == 0
    refused = run(*judge, *at)
    assert refused.exit_code == 1
    assert "was used for calibration" in refused.stderr
    allowed = run(*judge, "--allow-leak", "--json", *at)
    assert allowed.exit_code == 0, allowed.output
    assert json.loads(allowed.stdout)["leaked"] == 20
    # Which images they are is unknown then: refused as well.
    table(artifacts).unlink()
    unknown = run(*judge, *at)
    assert unknown.exit_code == 1
    assert "unknown whether --data contains calibration images" in unknown.stderr
    anyway = run(*judge, "--allow-leak", "--json", *at)
    assert json.loads(anyway.stdout)["leaked"] is None
    # Another calibration than the graph's tells nothing either.
    assert calibrate(artifacts, "--images", "24").exit_code == 0
    assert run(*judge, *at).exit_code == 1
    other = run(*judge, "--allow-leak", *at)
    assert other.exit_code == 0
    assert "unknown how many" in " ".join(other.stdout.split())


def test_a_table_edited_by_hand_is_refused(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    edited = json.loads(table(artifacts).read_text())
    edited["statistics"]["head"]["amax"] *= 2
    table(artifacts).write_text(json.dumps(edited))
    result = run("quantize", "--model", "demo", "--workspace", artifacts)
    assert result.exit_code == 1
    assert "does not match its seal" in result.stderr


def test_quantize_says_what_stays_float(artifacts: Path) -> None:
    assert calibrate(artifacts, "--images", "12").exit_code == 0
    at = ("--model", "demo", "--workspace", artifacts)
    result = run("quantize", "--exclude", "blocks.0.*", *at)
    assert "not INT8: blocks.*.attn.qkv, excluded by 'blocks.0.*'" in result.stdout
    assert "not INT8: head, not requested with --quantize-head" in result.stdout
    cpu = run("quantize", "--cpu", *at)
    assert "int8-cpu.onnx" in cpu.stdout
    verified = run("verify", "--data", TEST, "--json", "--images", "12", *at)
    rows = json.loads(verified.stdout)["rows"]
    assert [row["precision"] for row in rows] == ["fp32", "int8", "int8-cpu"]


def test_a_second_run_at_once_is_refused(artifacts: Path) -> None:
    """Both would write one unfinished file."""
    with sole_writer(table(artifacts), "clipdeploy calibrate"):
        refused = calibrate(artifacts, "--images", "8")
    assert refused.exit_code == 1
    assert f"process {os.getpid()}" in refused.stderr
    assert calibrate(artifacts, "--images", "8").exit_code == 0
