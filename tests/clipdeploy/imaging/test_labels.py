"""Labels of ImageNet and of the devkit, and what is wrong with them.

Covers: clipdeploy/imaging/devkit.py.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from clipdeploy.core.errors import DatasetError, FileError, UsageError
from clipdeploy.imaging import ImageFolder, Labelling, open_images, survey
from clipdeploy.models import cards

CLASSES = tuple(name for name, _ in cards.class_names(cards.find("clip-vit-base-p16")))
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
# Classes of the first validation images, 0-based in the order of the wnids.
EXPECTED = {1: 65, 2: 970, 3: 230, 4: 809}
# ILSVRC2012_IDs are not in wnid order; this made-up order is neither sorted nor the logits'.
ID_OF = {wnid: 1 + (7 * index + 3) % 1000 for index, wnid in enumerate(CLASSES)}


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def val(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet" / "val"
    for number in EXPECTED:
        write_image(root / name_of(number), number)
    return root


def val_txt(folder: Path, lines: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{name_of(number)} {label}\n" for number, label in EXPECTED.items())
    (folder / "val.txt").write_text(text if lines is None else lines)


def meta_mat() -> bytes:
    """A struct array as in the devkit: the leaves first, then the inner nodes of WordNet."""
    rows = [(ID_OF[wnid], wnid) for wnid in CLASSES] + [(1001, "n00001740")]
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object)]
    synsets = np.array([(number, wnid, "words") for number, wnid in rows], kind)
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, {"synsets": synsets.reshape(-1, 1)}, do_compression=True)
    return buffer.getvalue()


def devkit(folder: Path, lines: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{ID_OF[CLASSES[label]]}\n" for label in EXPECTED.values())
    (folder / TRUTH).write_text(text if lines is None else lines)
    (folder / "meta.mat").write_bytes(meta_mat())


def solution(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["ImageId,PredictionString"]
    for number, label in reversed(EXPECTED.items()):
        wnid = CLASSES[label]
        lines.append(f"{Path(name_of(number)).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8 ")
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines))


def labels_of(images: ImageFolder) -> dict[int, int | None]:
    return {int(entry.name[-13:-5]): entry.label for entry in images.entries}


@pytest.mark.parametrize(
    ("write", "where"),
    [
        (val_txt, "."),
        (val_txt, "meta"),
        (val_txt, ".."),
        (val_txt, "../meta"),
        (devkit, "."),
        (devkit, "data"),
        (devkit, "../ILSVRC2012_devkit_t12/data"),
        (solution, "."),
        (solution, ".."),
    ],
)
def test_label_files_are_found_at_the_usual_places(
    val: Path, write: Callable[[Path], None], where: str
) -> None:
    write(val / where)
    images = open_images(val, CLASSES)
    assert labels_of(images) == EXPECTED
    assert images.labelled


def test_without_a_label_file_a_flat_folder_has_no_labels(val: Path) -> None:
    images = open_images(val, CLASSES)
    assert not images.labelled
    assert survey(images).layout == "no labels"


@pytest.mark.parametrize("write", [val_txt, devkit, solution])
@pytest.mark.parametrize("top", ["", "imagenet/val/"])
def test_label_files_are_read_inside_archives(
    val: Path, write: Callable[[Path], None], top: str
) -> None:
    write(val)
    # Outside the folder, so that there are no files beside them.
    packed = val.parents[1] / "packed"
    packed.mkdir()
    with (
        zipfile.ZipFile(packed / "val.zip", "w") as zipped,
        tarfile.open(packed / "val.tar", "w") as tarred,
    ):
        for file in sorted(val.iterdir()):
            zipped.write(file, top + file.name)
            tarred.add(file, top + file.name)
    for path in (packed / "val.zip", packed / "val.tar"):
        assert labels_of(open_images(path, CLASSES)) == EXPECTED


def test_a_label_file_beside_an_archive_is_found(val: Path) -> None:
    with tarfile.open(val.with_suffix(".tar"), "w") as tarred:
        tarred.add(val, ".")
    val_txt(val.parent)
    assert labels_of(open_images(val.with_suffix(".tar"), CLASSES)) == EXPECTED


def test_class_folders_come_before_a_label_file(val: Path) -> None:
    write_image(val / CLASSES[7] / name_of(9), 9)
    for number in EXPECTED:
        (val / name_of(number)).unlink()
    val_txt(val, f"{CLASSES[7]}/{name_of(9)} 8\n")
    assert labels_of(open_images(val, CLASSES)) == {9: 7}
    # ... unless the user sets the layout.
    assert labels_of(open_images(val, CLASSES, labelling=Labelling(layout="list"))) == {9: 8}


def test_a_named_label_file_and_a_named_layout(val: Path, tmp_path: Path) -> None:
    val_txt(tmp_path / "mine")
    (tmp_path / "mine" / "val.txt").rename(tmp_path / "mine" / "labels")
    images = open_images(val, CLASSES, labelling=Labelling(labels=tmp_path / "mine" / "labels"))
    assert labels_of(images) == EXPECTED
    val_txt(val)
    assert not open_images(val, CLASSES, labelling=Labelling(layout="none")).labelled
    with pytest.raises(DatasetError, match="no label file of layout 'devkit'"):
        open_images(val, CLASSES, labelling=Labelling(layout="devkit"))
    with pytest.raises(FileError, match="nowhere"):
        open_images(val, CLASSES, labelling=Labelling(labels=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="unknown layout 'flat'"):
        open_images(val, CLASSES, labelling=Labelling(layout="flat"))  # type: ignore[arg-type]


def test_a_label_file_of_other_images_beside_the_folder_is_ignored(val: Path) -> None:
    for data in (b"other.JPEG 5\nworse 9999\n", b"\xff\xfe\x00 no text", b"", b"\n\n"):
        (val.parent / "val.txt").write_bytes(data)
        assert not open_images(val, CLASSES).labelled
        # Inside the folder, or named by the user, the same file is refused.
        with pytest.raises(
            DatasetError, match=r"val\.txt (lists none of the 4 images|is not UTF-8 text)"
        ):
            open_images(val, CLASSES, labelling=Labelling(labels=val.parent / "val.txt"))
    val_txt(val, "other.JPEG 5\n")
    with pytest.raises(DatasetError, match="lists none of the 4 images"):
        open_images(val, CLASSES)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("{1} 65\n{2} -1\n", "line 2: class -1 is negative"),
        ("{1} 1000\n", "line 1: class 1000 is too large: the model has 1000 classes"),
        ("{1} 65\n{2} n99999999\n", "line 2: 'n99999999' is not a class of the model"),
        ("{1} 65\n{2} ٣\n", "line 2: '٣' is not a class of the model"),
        ("{1} 65\n{2} 9999999999999\n", "line 2: '9999999999999' is not a class of the model"),
        ("{1} 65\n\n{2} 970\n", "line 2: the line is empty"),
        ("{1} 65\n{2}\n", "line 2: .*has no class"),
        ("{1} 65\n{2} 970\n{1} 66\n", "line 3: .*1.JPEG has class 66, but class 65 in line 1"),
        ("{1} -1\n{2} -2\n{3} -3\n", "line 1: class -1 is negative; 2 more bad lines: 2, 3"),
    ],
)
def test_a_bad_list_is_refused_by_line(val: Path, lines: str, fault: str) -> None:
    val_txt(val, lines.format("", *map(name_of, EXPECTED)))
    with pytest.raises(DatasetError, match=rf"val\.txt, {fault}") as caught:
        open_images(val, CLASSES)
    assert "\n" not in str(caught.value)


def test_missing_repeated_and_unlabelled_images_are_reported(val: Path) -> None:
    val_txt(val, f"{name_of(1)} 65\n{name_of(1)} 65\n{name_of(2)} 970\n{name_of(77)} 3\n")
    images = open_images(val, CLASSES)
    assert not images.labelled
    found = survey(images)
    assert not found
    assert (found.images, found.classes, found.absent_classes.count) == (4, 2, 998)
    assert found.missing.first == (name_of(77),)
    assert found.unlabelled.first == (name_of(3), name_of(4))
    assert found.repeated.count == 1
    assert "lists ILSVRC2012_val_00000001.JPEG in lines 1 and 2" in found.repeated.first[0]
    assert found.problems()[0] == f"1 listed images do not exist: {name_of(77)}"


def test_a_list_may_have_a_byte_order_mark_tabs_and_crlf(val: Path) -> None:
    rows = "\r\n".join(f"./{name_of(number)}\t{label}" for number, label in EXPECTED.items())
    val.joinpath("val.txt").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert labels_of(open_images(val, CLASSES)) == EXPECTED


def test_the_devkit_reads_a_subset_by_the_numbers_in_the_names(val: Path) -> None:
    devkit(val)
    (val / name_of(2)).unlink()
    images = open_images(val, CLASSES)
    assert labels_of(images) == {1: 65, 3: 230, 4: 809}
    assert survey(images).missing.first == ("ILSVRC2012_val_00000002",)
    write_image(val / name_of(5), 5)
    images = open_images(val, CLASSES)
    assert survey(images).unlabelled.first == (name_of(5),)


def test_the_devkit_maps_other_names_in_order_if_the_set_is_complete(val: Path) -> None:
    devkit(val)
    for number in EXPECTED:
        (val / name_of(number)).rename(val / f"photo{number:05d}.JPEG")
    labels = [entry.label for entry in open_images(val, CLASSES).entries]
    assert labels == list(EXPECTED.values())
    (val / "photo00002.JPEG").unlink()
    with pytest.raises(DatasetError, match="has 4 lines for 3 images"):
        open_images(val, CLASSES)


def test_ids_of_the_devkit_are_never_guessed(val: Path) -> None:
    devkit(val)
    (val / "meta.mat").unlink()
    with pytest.raises(DatasetError, match=r"need a meta\.mat beside it.*copy data/meta\.mat"):
        open_images(val, CLASSES)
    whole = meta_mat()
    for damaged in (b"", b"MATLAB", whole[:200], whole[: len(whole) // 2]):
        (val / "meta.mat").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"meta\.mat beside .* cannot be read"):
            open_images(val, CLASSES)


def test_the_devkit_without_scipy_is_an_error(val: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devkit(val)
    monkeypatch.setitem(__import__("sys").modules, "scipy.io", None)
    with pytest.raises(DatasetError, match=r'not installed .*"clipdeploy\[devkit\]"'):
        open_images(val, CLASSES)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("1\n0\n2\n3\n", "line 2: ID 0 is not a class"),
        ("1\n2\n1001\n3\n", "line 3: ID 1001 is not a class"),
        ("1\n\n2\n3\n", "line 2: the line is empty"),
        ("1\n2\n3\n-4\n", "line 4: ID -4 is not a class"),
        ("1\n2\nx\ny\n", "line 3: ID x is not a class of the model; 1 more bad lines: 4"),
    ],
)
def test_bad_ground_truth_is_refused_by_line(val: Path, lines: str, fault: str) -> None:
    devkit(val, lines)
    with pytest.raises(DatasetError, match=f"{TRUTH}, {fault}"):
        open_images(val, CLASSES)


def test_a_bad_solution_is_refused_by_line(val: Path) -> None:
    solution(val)
    path = val / "LOC_val_solution.csv"
    path.write_text(path.read_text().replace(CLASSES[970], "n99999999"))
    with pytest.raises(DatasetError, match=r"csv, line 4: 'n99999999' is not a class of the model"):
        open_images(val, CLASSES)


def test_a_shifted_label_file_would_show(val: Path) -> None:
    """The comparisons above detect classes that are off by one."""
    val_txt(val, "".join(f"{name_of(n)} {label - 1}\n" for n, label in EXPECTED.items()))
    assert labels_of(open_images(val, CLASSES)) != EXPECTED


def test_ids_of_the_devkit_have_no_first_class(val: Path) -> None:
    devkit(val)
    assert open_images(val, CLASSES).labelled
    with pytest.raises(DatasetError, match="devkit IDs, which are not class numbers"):
        open_images(val, CLASSES, labelling=Labelling(first_class=1))
