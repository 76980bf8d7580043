"""What `verify` is given is compared, not believed: shards, kept records, copies, leaks.

Covers: clipdeploy/stages/verify/on_disk.py, clipdeploy/verification/distinct.py,
    clipdeploy/verification/leaks.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from graph_faults import FP32_FAULTS
from PIL import Image
from verify_command import FEW, TEST, good, merge, refused, run, verify

from calibration.table import load_table, save_table
from clipdeploy.core.locks import sole_writer
from clipdeploy.models import cards
from clipdeploy.runners import OnnxRunner
from clipdeploy.stages.verify.run import verify_model
from clipdeploy.stages.verify.setup import VerifyScope
from clipdeploy.verification import results as results_file
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace

SOME = ("--max-drop", "30", "--batch", "4", "--workers", "0")


@pytest.fixture
def whole_workspace(demo_workspace: Workspace, tmp_path: Path) -> Path:
    """A workspace that may be changed, with every graph and the calibration."""
    shutil.copytree(demo_workspace.root, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def bitmaps(digits: Path, tmp_path: Path) -> Path:
    """Forty digits in class folders as BMP: all files have one size, and are from yesterday."""
    for path in digits.rglob("*.png"):
        place = tmp_path / "bitmaps" / path.parent.name / f"{path.stem}.bmp"
        place.parent.mkdir(parents=True, exist_ok=True)
        if len(list(place.parent.iterdir())) < 4:
            Image.open(path).convert("RGB").save(place)
            os.utime(place, (1, 1))
    return tmp_path / "bitmaps"


def folder(artifacts: Path) -> Path:
    return artifacts / cards.DEMO


def graph(artifacts: Path) -> Path:
    return folder(artifacts) / "fp32.onnx"


def ruin(path: Path) -> None:
    """The graph of another export with the same passport, which gets everything wrong."""
    proto = onnx.load(path)
    edit, _ = FP32_FAULTS["the head's rows rolled"]
    edit(proto)
    onnx.save(proto, path)


def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: OnnxRunner, images: object) -> None:
        raise AssertionError("an image was run again")

    monkeypatch.setattr(OnnxRunner, "__call__", never)


def shards(artifacts: Path, data: Path, *more: str) -> None:
    for part in ("1/2", "2/2"):
        assert verify(artifacts, *SOME, *more, "--shard", part, data=data).exit_code == 0


# --- shards


def test_shards_of_an_artifact_that_was_replaced_since(artifacts: Path) -> None:
    shards(artifacts, TEST, "--images", "24")
    before = graph(artifacts).read_bytes()
    ruin(graph(artifacts))
    refused(merge(artifacts, "--max-drop", "30"), 1, "fp32.onnx has been replaced since")
    graph(artifacts).unlink()
    refused(merge(artifacts, "--max-drop", "30"), 1, "fp32.onnx is missing")
    graph(artifacts).write_bytes(before)
    assert good(merge(artifacts, "--max-drop", "30", "--json"))


def test_shards_of_two_artifacts_under_one_name(artifacts: Path) -> None:
    assert verify(artifacts, *FEW, "--shard", "1/2").exit_code == 0
    ruin(graph(artifacts))
    assert verify(artifacts, *FEW, "--shard", "2/2").exit_code == 0
    refused(merge(artifacts), 1, "not of one run", "artifacts")


def test_shards_of_two_sets_of_images_with_the_same_names(artifacts: Path, bitmaps: Path) -> None:
    """In the second one, a third of the images show another class's digit."""
    assert verify(artifacts, *SOME, "--shard", "1/2", data=bitmaps).exit_code == 0
    for digit in range(0, 10, 3):
        for mine, theirs in zip(
            sorted((bitmaps / str(digit)).iterdir()),
            sorted((bitmaps / str((digit + 1) % 10)).iterdir()),
            strict=True,
        ):
            shutil.copy(theirs, mine)
    assert verify(artifacts, *SOME, "--shard", "2/2", data=bitmaps).exit_code == 0
    refused(merge(artifacts, "--max-drop", "30"), 1, "not of one run", "contents")


@pytest.mark.parametrize("when", ["between the shards", "before the merge"])
def test_one_image_that_was_replaced_under_its_name(
    when: str, artifacts: Path, bitmaps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a file of the same size: no sample and no size need show it."""
    monkeypatch.setattr("clipdeploy.verification.batches._SAMPLED", 1)
    assert verify(artifacts, *SOME, "--shard", "1/2", data=bitmaps).exit_code == 0
    kept = results_file.read_results(folder(artifacts) / "verification.1-of-2.jsonl")
    # Neither the first of the list, which is sampled, nor one of the second shard.
    name = kept.batches[0].records[3].name
    other = next(path for path in bitmaps.rglob("*.bmp") if path.parent.name != name[0])
    if when == "between the shards":
        shutil.copy(other, bitmaps / name)
    assert verify(artifacts, *SOME, "--shard", "2/2", data=bitmaps).exit_code == 0
    shutil.copy(other, bitmaps / name)
    found = merge(artifacts, "--max-drop", "30")
    refused(found, 1, f"{name} in ", "is not the image that was verified")


def test_a_merge_uses_its_shards_up(artifacts: Path) -> None:
    shards(artifacts, TEST, "--images", "24")
    assert good(merge(artifacts, "--max-drop", "30", "--json"))
    assert sorted(path.name for path in folder(artifacts).glob("verification*")) == [
        "verification.jsonl"
    ]
    refused(merge(artifacts), 1, "no shard to merge")


def test_a_finished_run_is_no_shard_to_be_removed(artifacts: Path) -> None:
    whole = verify(artifacts, *FEW, "--json")
    kept = folder(artifacts) / "verification.jsonl"
    assert merge(artifacts, kept, "--max-drop", "30", "--json").stdout == whole.stdout
    assert kept.exists()


def test_a_merge_without_the_images_says_so(artifacts: Path, bitmaps: Path) -> None:
    shards(artifacts, bitmaps)
    bitmaps.rename(bitmaps.with_name("moved"))
    found = good(merge(artifacts, "--max-drop", "30", "--json"))
    assert any("images were not compared with the records" in each for each in found["problems"])
    bitmaps.with_name("moved").rename(bitmaps)
    shards(artifacts, bitmaps, "--force")
    assert not good(merge(artifacts, "--max-drop", "30", "--json"))["problems"]


def test_a_merge_finds_moved_images(artifacts: Path, bitmaps: Path) -> None:
    shards(artifacts, bitmaps)
    moved = bitmaps.rename(bitmaps.with_name("moved"))
    found = good(merge(artifacts, "--max-drop", "30", "--data", moved, "--json"))
    assert not found["problems"]


# --- kept records


def other_answer(data: bytes) -> bytes:
    """The reference's first answer to one image is another class."""
    return re.sub(
        rb'("",[\d.]+,\[\[)(\d)', lambda m: m[1] + (b"1" if m[2] != b"1" else b"2"), data, count=1
    )


EDITS: dict[str, Callable[[bytes], bytes]] = {
    "an answer": other_answer,
    "a label": lambda data: data.replace(b'"],3,"",', b'"],4,"",', 1),
    "a repeated line": lambda data: data + data.split(b"\n")[1] + b"\n",
    "every line twenty times": lambda data: (
        data + b"".join(line + b"\n" for line in data.split(b"\n")[1:-1] for _ in range(20))
    ),
    "a line left out": lambda data: b"\n".join(
        line for index, line in enumerate(data.split(b"\n")) if index != 2
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_records_are_not_taken_over(name: str, artifacts: Path) -> None:
    first = verify(artifacts, *FEW, "--json")
    path = folder(artifacts) / "verification.jsonl"
    data = path.read_bytes()
    path.write_bytes(EDITS[name](data))
    assert path.read_bytes() != data
    assert verify(artifacts, *FEW, "--json").stdout == first.stdout
    assert path.read_bytes() == data


def test_records_are_those_of_the_artifacts_bytes(artifacts: Path) -> None:
    """A header that was given the hash of another graph, by hand."""
    first = good(verify(artifacts, *FEW, "--json"))
    path = folder(artifacts) / "verification.jsonl"
    kept = results_file.read_results(path)
    (old,) = kept.run_key.artifacts
    ruin(graph(artifacts))
    from clipdeploy.core.files import sha256_file

    new = sha256_file(graph(artifacts)).encode()
    path.write_bytes(path.read_bytes().replace(old.sha256.encode(), new))
    found = json.loads(verify(artifacts, *FEW, "--json").stdout)
    assert first["rows"][0]["verdict"] == "equivalent"
    assert found["rows"][0]["verdict"] == "regressed"


def test_what_is_known_of_an_artifact_is_not_computed_again(
    whole_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [folder(whole_workspace) / f"{p}.onnx" for p in ("fp32", "fp16", "int8")]
    three = good(verify(whole_workspace, *names, *FEW, "--json"))
    with monkeypatch.context() as patch:
        no_run(patch)
        for chosen in ([names[1]], [names[2], names[0]], names):
            found = good(verify(whole_workspace, *chosen, *FEW, "--json"))
            rows = {row["artifact"]: row for row in three["rows"]}
            assert found["rows"] == [rows[str(name)] for name in chosen]
        # An early stop goes by the same records.
        at = ("--images", "12", "--batch", "3", "--workers", "0", "--max-drop", "50")
        assert good(verify(whole_workspace, *names, *at, "--sequential", "--json"))["sequential"]
    other = whole_workspace / "other.onnx"
    shutil.copy(names[0], other)
    assert good(verify(whole_workspace, other, *FEW, "--json"))
    # The three are still known beside the other one.
    no_run(monkeypatch)
    assert good(verify(whole_workspace, *names, *FEW, "--json"))["rows"] == three["rows"]


def test_without_a_gpu_the_way_out_is_named_and_costs_nothing(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    at = ("--model", "demo", "--workspace", artifacts)
    assert run("build-engine", "--fp32", *at).exit_code == 0
    stopped = verify(artifacts, *FEW)
    assert stopped.exit_code == 3
    assert "fp32 engine not executed" in " ".join(stopped.stdout.split())
    assert "--graphs-only judges only the graphs" in stopped.stderr
    no_run(monkeypatch)
    result = verify(artifacts, *FEW, "--graphs-only")
    assert result.exit_code == 0
    line = "EQUIVALENT: 1 graph loses no more than 30.00 points of top-1; 1 engine not executed"
    assert line in " ".join(result.stdout.split())


def test_a_second_run_at_once_is_refused_and_the_first_one_named(artifacts: Path) -> None:
    kept = folder(artifacts) / "verification.jsonl"
    with sole_writer(kept, "clipdeploy verify"):
        refused(verify(artifacts, *FEW), 1, "verification.jsonl", f"process {os.getpid()}")
        # A shard keeps its own file.
        assert verify(artifacts, *FEW, "--shard", "1/2").exit_code == 0
    assert verify(artifacts, *FEW).exit_code == 0


# --- images


def copied(digits: Path, place: Path, save: Callable[[Path, Path], object]) -> Path:
    """Ten digits, one of each class, ten times each: 100 different ones prove 4 points."""
    for digit in range(10):
        first = min((digits / str(digit)).iterdir())
        (place / str(digit)).mkdir(parents=True)
        for number in range(10):
            save(first, place / str(digit) / f"{number}")
    return place


def _same_bytes(source: Path, path: Path) -> None:
    shutil.copy(source, path.with_suffix(".png"))


def _lossless(source: Path, path: Path) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        (".bmp", {}),
        (".png", {"compress_level": 1}),
        (".png", {"compress_level": 9}),
        (".tiff", {}),
        (".webp", {"lossless": True}),
    ]
    suffix, options = kinds[int(path.name) % len(kinds)]
    Image.open(source).convert("RGB").save(path.with_suffix(suffix), **options)


def _jpeg(source: Path, path: Path) -> None:
    quality = 75 + int(path.name) % 20
    Image.open(source).convert("RGB").save(path.with_suffix(".jpg"), quality=quality)


@pytest.mark.parametrize("save", [_same_bytes, _lossless, _jpeg])
def test_ten_images_copied_ten_times_prove_nothing(
    save: Callable[[Path, Path], object], artifacts: Path, digits: Path, tmp_path: Path
) -> None:
    data = copied(digits, tmp_path / "copies", save)
    at = ("--max-drop", "4", "--workers", "0")
    result = verify(artifacts, *at, "--baseline", "none", "--json", data=data)
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert found["rows"][0]["verdict"] == "undecided"
    assert found["images"] - found["near_copies"] == 10
    assert found["images"] + found["copies"] == 100


def leaky(whole: Path, digits: Path, save: Callable[[Path, Path], object]) -> Path:
    """Two test digits of each class, and a calibration image saved anew."""
    import zipfile

    name = load_table(folder(whole) / "calibration.json").images[7].name
    with zipfile.ZipFile(cards.demo_file("calibration.zip")) as archive:
        archive.extract(name, whole)
    for place in digits.iterdir():
        for path in sorted(place.iterdir())[2:]:
            path.unlink()
    save(whole / name, digits / Path(name).parent.name / "7")
    return digits


@pytest.mark.parametrize("save", [_same_bytes, _lossless])
def test_a_calibration_image_saved_anew_is_a_leak(
    save: Callable[[Path, Path], object], whole_workspace: Path, digits: Path
) -> None:
    data = leaky(whole_workspace, digits, save)
    at = ("--max-drop", "30", "--workers", "0", "--graphs-only")
    refused(verify(whole_workspace, *at, data=data), 1, "was used for calibration")
    found = good(verify(whole_workspace, *at, "--allow-leak", "--json", data=data))
    assert (found["leaked"], found["near_leaked"]) == (1, 0)
    # What one run allowed, another one that goes by its records does not.
    refused(verify(whole_workspace, *at, data=data), 1, "was used for calibration")
    # An FP32 graph was calibrated on nothing.
    name = folder(whole_workspace) / "fp32.onnx"
    assert good(verify(whole_workspace, name, *at, "--json", data=data))["leaked"] == 0


def test_a_calibration_that_knows_no_pixels_is_named_in_the_result(whole_workspace: Path) -> None:
    table = folder(whole_workspace) / "calibration.json"
    known = load_table(table)
    bare = tuple(replace(image, pixels="", thumbnail=b"") for image in known.images)
    save_table(replace(known, images=bare), table)
    # The artifacts are those of this table: its hash is in their passport.
    at = ("--model", "demo", "--workspace", whole_workspace)
    assert run("quantize", *at, "--force").exit_code == 0
    path = folder(whole_workspace) / "int8.onnx"
    found = good(verify(whole_workspace, path, *FEW, "--json"))
    assert found["leaked"] == 0
    assert any("older clipdeploy" in each for each in found["problems"])


def test_one_saved_with_loss_is_counted(whole_workspace: Path, digits: Path) -> None:
    data = leaky(whole_workspace, digits, _jpeg)
    at = ("--max-drop", "30", "--workers", "0", "--graphs-only", "--json")
    found = good(verify(whole_workspace, *at, data=data))
    assert (found["leaked"], found["near_leaked"]) == (0, 1)
    assert any("1 images look almost like one" in each for each in found["problems"])


@pytest.mark.parametrize("how", ["no calibration", "another calibration", "no passport"])
def test_unknown_calibration_images_are_unknown(how: str, whole_workspace: Path) -> None:
    path = folder(whole_workspace) / "int8.onnx"
    table = folder(whole_workspace) / "calibration.json"
    at: tuple[str | Path, ...] = (path, *FEW)
    if how == "no calibration":
        table.unlink()
    elif how == "another calibration":
        images = ("--images", "24", "--data", cards.demo_file("calibration.zip"))
        where = ("--model", "demo", "--workspace", whole_workspace)
        assert run("calibrate", *images, *where, "--force").exit_code == 0
    else:
        proto = onnx.load(path)
        del proto.metadata_props[:]
        onnx.save(proto, path)
    if how != "no passport":
        refused(
            verify(whole_workspace, *at), 1, "unknown whether --data contains calibration images"
        )
    found = good(verify(whole_workspace, *at, "--allow-leak", "--json"))
    assert found["leaked"] is None
    assert found["rows"][0]["calibrated"] is None


def test_a_shard_alone_is_no_pass(artifacts: Path) -> None:
    shard = verify_model(
        Workspace(artifacts),
        cards.DEMO,
        TEST,
        VerifyConfig(max_drop=15, batch=3, workers=0, shard=(1, 2)),
        VerifyScope(limit=24),
    )
    assert shard.verification is None
    assert not shard
    assert shard.results is not None
    assert shard.results.exists()
