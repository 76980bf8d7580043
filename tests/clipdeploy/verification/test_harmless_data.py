"""The same pixels in other files, and other neighbours in a batch: the same verdict."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from judging import each_once
from PIL import Image

from clipdeploy.imaging import ImageFolder, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.result import Verification
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

CLASSES = tuple("0123456789")
# 40 images without a difference prove a drop below 8.8 points.
ALLOWED = 9.0

Judged = tuple[Verification, list[ImageRecord]]
Judge = Callable[..., Judged]


@pytest.fixture(scope="module")
def judge(demo_workspace: Workspace, demo_model: LoadedModel) -> Judge:
    path = demo_workspace.graph(cards.DEMO, "fp32")
    target = Target(path, "graph", read_passport(path))

    def run(images: ImageFolder, batch: int | None = None) -> Judged:
        """With ``batch`` images at once; without it, repeated calls are answered from memory."""
        config = VerifyConfig(max_drop=ALLOWED, batch=batch or 16, workers=0)
        with nullcontext() if batch else each_once():
            results = run_verification(demo_model, target.passport, [target], images, config)
        result = judge_results(results, ALLOWED)
        assert [row.verdict for row in result.rows] == ["equivalent"]
        return result, results.records

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty digits as JPEG files."""
    root = tmp_path_factory.mktemp("digits")
    chosen = select(open_images(cards.demo_file("test.zip"), CLASSES), 40, seed=0)
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        for entry in chosen.entries:
            path = (root / entry.name).with_suffix(".jpg")
            path.parent.mkdir(exist_ok=True)
            with archive.open(entry.name) as stream:
                Image.open(stream).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def plain(judge: Judge, folder: Path) -> Judged:
    return judge(open_images(folder, CLASSES))


def pack_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.jpg"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def pack_tar(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        archive.add(folder, "val")
    return path


@pytest.mark.parametrize("pack", [pack_zip, pack_tar])
def test_in_an_archive(
    pack: Callable[[Path, Path], Path], folder: Path, plain: Judged, judge: Judge, tmp_path: Path
) -> None:
    path = pack(folder, tmp_path / pack.__name__.replace("pack_", "digits."))
    result, records = judge(open_images(path, CLASSES))
    assert result.rows == plain[0].rows
    assert [r.sha256 for r in records] == [r.sha256 for r in plain[1]]
    assert [r.outcomes for r in records] == [r.outcomes for r in plain[1]]


def test_decoded_and_kept_without_loss(
    folder: Path, plain: Judged, judge: Judge, tmp_path: Path
) -> None:
    """The pixels of the JPEG files as PNG: other bytes, the same logits to the last bit."""
    for file in folder.rglob("*.jpg"):
        path = (tmp_path / file.relative_to(folder)).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        Image.open(file).save(path)
    result, records = judge(open_images(tmp_path, CLASSES))
    assert result.rows == plain[0].rows
    assert [r.outcomes for r in records] == [r.outcomes for r in plain[1]]
    assert not {r.sha256 for r in records} & {r.sha256 for r in plain[1]}


@pytest.mark.parametrize("batch", [1, 7, 40, 50, 500])
def test_another_batch_size(batch: int, folder: Path, plain: Judged, judge: Judge) -> None:
    result, records = judge(open_images(folder, CLASSES), batch)
    assert [r.reference.top for r in records] == [r.reference.top for r in plain[1]]
    ours, theirs = result.rows[0].fidelity, plain[0].rows[0].fidelity
    assert ours is not None
    assert theirs is not None
    # Sums in another order: float32's rounding and no more.
    assert ours.max_abs < 5 * theirs.max_abs
    assert ours.accuracy == theirs.accuracy


def copied(folder: Path, root: Path, change: Callable[[Path], Path]) -> Path:
    """The files under other names: ``change`` takes the path inside of the folder."""
    for file in folder.rglob("*.jpg"):
        path = root / change(file.relative_to(folder))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read_bytes())
    return root


NAMES: dict[str, Callable[[Path], Path]] = {
    "in folders below the class": lambda path: path.parent / "a" / path.stem[-1] / path.name,
    "with spaces and umlauts": lambda path: path.with_name(f"ein Bild, schön {path.name}"),
    "in upper case": lambda path: path.with_name(path.name.upper()),
    "in reverse order": lambda path: path.with_name(f"{path.stem[::-1]}.jpg"),
    "ending in jpeg": lambda path: path.with_suffix(".jpeg"),
}


@pytest.mark.parametrize("how", NAMES)
def test_under_other_names(
    how: str, folder: Path, plain: Judged, judge: Judge, tmp_path: Path
) -> None:
    root = copied(folder, tmp_path / "names", NAMES[how])
    result, records = judge(open_images(root, CLASSES))
    assert {r.sha256 for r in records} == {r.sha256 for r in plain[1]}
    assert result.reference == plain[0].reference


def test_in_one_folder_with_a_label_file(
    folder: Path, plain: Judged, judge: Judge, tmp_path: Path
) -> None:
    lines = []
    for number, file in enumerate(sorted(folder.rglob("*.jpg"))):
        (tmp_path / f"{number:03}.jpg").symlink_to(file)
        lines.append(f"{number:03}.jpg {file.parent.name}\n")
    (tmp_path / "val.txt").write_text("".join(lines))
    result, _ = judge(open_images(tmp_path, CLASSES))
    assert result.reference == plain[0].reference


def test_in_grey(folder: Path, judge: Judge, tmp_path: Path) -> None:
    """The digits are grey: one channel says what three do."""
    for file in folder.rglob("*.jpg"):
        path = (tmp_path / file.relative_to(folder)).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        Image.open(file).convert("L").save(path)
    judge(open_images(tmp_path, CLASSES))


def test_with_a_channel_for_opacity(
    folder: Path, plain: Judged, judge: Judge, tmp_path: Path
) -> None:
    """All pixels are opaque."""
    for file in folder.rglob("*.jpg"):
        path = (tmp_path / file.relative_to(folder)).with_suffix(".png")
        path.parent.mkdir(exist_ok=True)
        Image.open(file).convert("RGBA").save(path)
    result, _ = judge(open_images(tmp_path, CLASSES))
    assert result.reference == plain[0].reference


def test_more_of_one_class_than_of_the_others(judge: Judge) -> None:
    images = open_images(cards.demo_file("test.zip"), CLASSES)
    many = [entry for entry in images.entries if entry.label == 3][:30]
    few = [entry for entry in images.entries if entry.label in (0, 8)][::8]
    judge(ImageFolder(images.root, (*many, *few), images.origin))


@pytest.mark.parametrize("seed", [1, 2])
def test_other_images_of_the_same_set(seed: int, judge: Judge) -> None:
    judge(select(open_images(cards.demo_file("test.zip"), CLASSES), 45, seed=seed))


def test_another_order_of_the_images(folder: Path, plain: Judged, judge: Judge) -> None:
    images = open_images(folder, CLASSES)
    entries = tuple(images.entries[i] for i in np.random.default_rng(3).permutation(40))
    result, records = judge(ImageFolder(images.root, entries, images.origin))
    by_name = {r.name: r for r in plain[1]}
    assert all(r.reference.top == by_name[r.name].reference.top for r in records)
    assert result.reference == plain[0].reference
