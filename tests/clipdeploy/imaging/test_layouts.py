"""Layouts of images and labels other than ImageNet's own.

Covers: clipdeploy/imaging/folders.py, clipdeploy/imaging/formats.py,
    clipdeploy/imaging/images.py, clipdeploy/imaging/label_files.py,
    clipdeploy/imaging/label_rows.py, clipdeploy/imaging/survey.py.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdeploy.core.errors import DatasetError, UsageError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess
from clipdeploy.imaging import ImageFolder, Labelling, iter_crops, open_images, survey, with_labels
from clipdeploy.models import cards

WNIDS = tuple(name for name, _ in cards.class_names(cards.find("clip-vit-base-p16")))
PETS = ("cat", "dog", "emu")


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def fill(root: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(seed))
    return root


def labels_of(images: ImageFolder) -> dict[str, int | None]:
    return {entry.name: entry.label for entry in images.entries}


def numbered(root: Path, numbers: Sequence[int], form: str = "{}") -> Path:
    return fill(root, [f"{form.format(number)}/x.png" for number in numbers])


@pytest.mark.parametrize("form", ["{}", "{:04d}", "{:03d}"])
@pytest.mark.parametrize("first", [0, 1])
def test_folders_of_numbers_are_classes_in_numeric_order(
    tmp_path: Path, form: str, first: int
) -> None:
    numbers = range(first, first + 1000)
    images = open_images(numbered(tmp_path, numbers, form), WNIDS)
    assert labels_of(images) == {f"{form.format(n)}/x.png": n - first for n in numbers}
    assert f"folder {first} is the first class" in survey(images).layout


@pytest.mark.parametrize(
    "names",
    [
        ("Golden_Retriever", "TABBY", "white-shark"),
        ("golden retriever", "tabby, tabby cat", "great white shark"),
        ("n02099601", "tabby cat", "man_eater"),
    ],
)
def test_folders_may_have_the_words_of_imagenet_in_any_spelling(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    images = open_images(fill(tmp_path, [f"val/{name}/x.png" for name in names]), WNIDS)
    assert labels_of(images) == {
        f"val/{n}/x.png": i for n, i in zip(names, (207, 281, 2), strict=True)
    }
    assert "other spellings" in survey(images).layout


def test_own_classes_may_have_imagenets_wnids_or_other_cases_as_folders(tmp_path: Path) -> None:
    own = ("golden retriever", "Emu_bird", "cat")
    images = open_images(fill(tmp_path, ["n02099601/x.png", "emu bird/x.png", "cat/x.png"]), own)
    assert labels_of(images) == {"n02099601/x.png": 0, "emu bird/x.png": 1, "cat/x.png": 2}


def test_an_exact_name_comes_before_other_spellings(tmp_path: Path) -> None:
    images = open_images(fill(tmp_path, ["Cat/x.png", "cat/x.png"]), ("cat", "Cat"))
    assert labels_of(images) == {"Cat/x.png": 1, "cat/x.png": 0}
    assert "spellings" not in survey(images).layout


# Crane is a bird and a machine; a folder of all images may have any name.
@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("crane", "tabby"), "fits several classes: n02012849, n03126707"),
        (("tabby", "Tabby"), "folders Tabby and tabby .* are the same class, n02123045"),
        (
            ("tabby", "tabbi"),
            r"not classes: tabbi \(nearest: n02123045\); classes without a folder: ",
        ),
        (("tabbi", "zzqx"), r"not classes: tabbi \(nearest: n02123045\), zzqx"),
        (("monitor",), r"not classes: monitor \(nearest: n03782006\)"),
    ],
)
def test_folders_that_fit_no_class_or_several_are_named(
    folders: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=message):
        open_images(
            fill(tmp_path, [f"{folder}/{n}.png" for folder in folders for n in "ab"]), WNIDS
        )


def test_a_label_file_may_have_other_spellings(tmp_path: Path) -> None:
    fill(tmp_path, ["a.png", "b.png"])
    (tmp_path / "val.txt").write_text("a.png Tabby\nb.png Golden_retriever\n")
    assert labels_of(open_images(tmp_path, WNIDS)) == {"a.png": 281, "b.png": 207}


def test_an_incomplete_set_of_numbers_needs_first_class(tmp_path: Path) -> None:
    root = numbered(tmp_path / "some", (7, 21, 999))
    with pytest.raises(DatasetError, match=r"7 to 999: .* --first-class 0 or --first-class 1"):
        open_images(root, WNIDS)
    assert set(
        labels_of(open_images(root, WNIDS, labelling=Labelling(first_class=0))).values()
    ) == {
        7,
        21,
        999,
    }
    assert set(
        labels_of(open_images(root, WNIDS, labelling=Labelling(first_class=1))).values()
    ) == {
        6,
        20,
        998,
    }
    # With a 0, numbers can only start at 0.
    numbered(root, (0,))
    assert set(labels_of(open_images(root, WNIDS)).values()) == {0, 7, 21, 999}
    with pytest.raises(DatasetError, match="has a folder 0, but the model's 1000 classes are 1 to"):
        open_images(root, WNIDS, labelling=Labelling(first_class=1))


@pytest.mark.parametrize(
    ("numbers", "fault"),
    [((0, 1000), "has a folder 1000"), ((0, 3), "two folders with the number 3")],
)
def test_numbers_that_are_not_classes_are_refused(
    tmp_path: Path, numbers: Sequence[int], fault: str
) -> None:
    numbered(tmp_path, numbers)
    if "two" in fault:
        numbered(tmp_path, (3,), "{:03d}")
    with pytest.raises(DatasetError, match=fault):
        open_images(tmp_path, WNIDS)


def test_unnamed_classes_get_the_folder_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "val", [f"{pet}/{n}.png" for pet in reversed(PETS) for n in range(2)])
    images = open_images(root, count=3)
    assert images.origin.class_names == PETS
    assert labels_of(images)["dog/1.png"] == 1
    assert "in the order of the folder names" in survey(images).layout
    assert labels_of(open_images(tmp_path, count=3))["val/emu/0.png"] == 2
    for count in (2, 4):
        with pytest.raises(DatasetError, match=rf"3 class folders .* has {count} unnamed classes"):
            open_images(root, count=count)
    with pytest.raises(DatasetError, match="3 class names for 4 classes"):
        open_images(root, PETS, count=4)


def test_folder_numbers_do_not_define_the_order_of_unnamed_classes(tmp_path: Path) -> None:
    """ImageFolder sorts 10 before 2, so a model trained with it has another order."""
    root = numbered(tmp_path, range(12))
    with pytest.raises(DatasetError, match="10 before 2") as caught:
        open_images(root, count=12)
    assert "--class-names" in caught.value.hint
    assert (
        labels_of(open_images(root, count=12, labelling=Labelling(first_class=0)))["10/x.png"] == 10
    )
    by_name = tuple(sorted(map(str, range(12))))
    assert labels_of(open_images(root, by_name))["10/x.png"] == 2
    # With leading zeros both orders are equal.
    padded = numbered(tmp_path / "padded", range(12), "{:02d}")
    assert labels_of(open_images(padded, count=12))["10/x.png"] == 10


FLAT = ("a.png", "b.png", "c.png")
TABLES = {
    "header": "ImageId,Class\na.png,0\nb.png,2\nc.png,1\n",
    "stems": "ImageId,Class\na,0\nb,2\nc,1\n",
    "names": "image,label\na.png,cat\nb.png,emu\nc.png,dog\n",
    "quoted": '"id","target"\n"a.png","0"\n"b.png","2"\n"c.png","1"\n',
    "no header": "a.png,cat\nb.png,emu\nc.png,dog\n",
    "class first": "label;file\n0;a.png\n2;b.png\n1;c.png\n",
    "tabs": "filename\tclass\na.png\tcat\nb.png\temu\nc.png\tdog\n",
    "more columns": "file,width,label\na.png,8,0\nb.png,8,2\nc.png,8,1\n",
    "number and name": "file,label,class_name\na.png,0,cat\nb.png,2,emu\nc.png,1,dog\n",
    "boxes": "ImageId,PredictionString\na,cat 1 2 3 4 cat 5 6 7 8 \nb,emu 1 2 3 4\nc,dog 9 8 7 6",
    "windows": "ImageId,Class\r\na.png,0\r\nb.png,2\r\nc.png,1\r\n",
    "from 1": "ImageId,Class\na.png,1\nb.png,3\nc.png,2\n",
    "paths": "ImageId,Class\nold/place/../a.png,0\nb.png,2\n./c.png,1\n",
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_labels_are_read_whatever_their_header(tmp_path: Path, kind: str) -> None:
    root = fill(tmp_path / "images", FLAT)
    table = tmp_path / "mine.csv"
    table.write_bytes(TABLES[kind].encode())
    wanted = {"a.png": 0, "b.png": 2, "c.png": 1}
    if kind == "paths":
        wanted |= {"a.png": None}  # type: ignore[dict-item]
    assert labels_of(open_images(root, PETS, labelling=Labelling(labels=table))) == wanted


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("file,height,width\na.png,8,9\nb.png,8,9\n", "the class column of .* is ambiguous"),
        ("file,label\na.png,cat\nb.png,fox\n", "line 3: 'fox' is not a class of the model"),
        ("file,label\na.png,0\nb.png,3\n", "line 3: class 3 is too large"),
        ("file,label\na.png,0\nb.png\n", "line 3: it has no class"),
        ("file,label\na.png,0\na.png,1\n", "line 3: a.png has class 1, but class 0 in line 2"),
        ('file,label\n"a.png,0\n', "not a valid table|is ambiguous|lists none"),
        ("file,label\nx.png,0\n", "lists none of the 3 images"),
    ],
)
def test_a_bad_table_is_refused_by_line(tmp_path: Path, text: str, fault: str) -> None:
    root = fill(tmp_path / "images", FLAT)
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(DatasetError, match=fault):
        open_images(root, PETS, labelling=Labelling(labels=tmp_path / "mine.csv"))


def test_a_class_name_that_is_the_number_of_another_class_is_refused(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", FLAT)
    (tmp_path / "mine.csv").write_text("file,label\na.png,1\nb.png,2\n")
    with pytest.raises(DatasetError, match="1 is both a number and the name of class 0"):
        open_images(root, ("1", "2", "3"), labelling=Labelling(labels=tmp_path / "mine.csv"))
    images = open_images(
        root, ("1", "2", "3"), labelling=Labelling(labels=tmp_path / "mine.csv", first_class=1)
    )
    assert labels_of(images) == {"a.png": 0, "b.png": 1, "c.png": None}


def test_file_names_are_found_in_folders_if_they_are_unique(tmp_path: Path) -> None:
    root = fill(tmp_path, ["one/a.png", "one/b.png", "two/c.png"])
    (root / "val.txt").write_text("a.png 0\nb.png 2\nc.png dog\n")
    assert labels_of(open_images(root, PETS)) == {"one/a.png": 0, "one/b.png": 2, "two/c.png": 1}
    fill(root, ["two/a.png"])
    with pytest.raises(DatasetError, match=r"line 1: several images are named a\.png"):
        open_images(root, PETS)


def test_a_label_file_names_unnamed_classes(tmp_path: Path) -> None:
    root = fill(tmp_path, FLAT)
    (root / "val.txt").write_text("a.png cat\nb.png emu\nc.png dog\n")
    images = open_images(root, count=3)
    assert images.origin.class_names == PETS
    assert labels_of(images) == {"a.png": 0, "b.png": 2, "c.png": 1}
    with pytest.raises(DatasetError, match="names 3 classes, but the model has 5"):
        open_images(root, count=5)
    (root / "val.txt").write_text("a.png 0\nb.png 4\nc.png 1\n")
    assert labels_of(open_images(root, count=5)) == {"a.png": 0, "b.png": 4, "c.png": 1}


def test_kaggles_tree_is_found_from_its_folder_and_explained_from_its_top(tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2)]
    val = "ILSVRC/Data/CLS-LOC/val"
    fill(tmp_path, [f"{val}/{name}.JPEG" for name in names])
    rows = [f"{name},{WNIDS[5 * n]} 1 2 3 4" for n, name in enumerate(names)]
    text = "\n".join(["ImageId,PredictionString", *rows])
    (tmp_path / "LOC_val_solution.csv").write_text(text)
    assert [entry.label for entry in open_images(tmp_path / val, WNIDS).entries] == [0, 5]
    assert [entry.label for entry in open_images(tmp_path, WNIDS).entries] == [0, 5]
    fill(
        tmp_path,
        [f"ILSVRC/Data/CLS-LOC/train/{WNIDS[1]}/x.JPEG", "ILSVRC/Data/CLS-LOC/test/y.JPEG"],
    )
    images = open_images(tmp_path, WNIDS)
    with pytest.raises(DatasetError, match="2 of 4 images have no class") as caught:
        with_labels(images)
    assert f"pass {tmp_path / val}, or use --skip-unlabelled" in caught.value.hint
    assert labels_of(open_images(tmp_path, WNIDS, labelling=Labelling(skip_unlabelled=True))) == {
        f"{val}/{names[0]}.JPEG": 0,
        f"{val}/{names[1]}.JPEG": 5,
    }
    (tmp_path / "LOC_val_solution.csv").unlink()
    with pytest.raises(DatasetError, match=f"contains several sets of images: .*{val}"):
        open_images(tmp_path, WNIDS)


def test_images_that_all_have_no_class_are_refused_with_what_could_name_them(
    tmp_path: Path,
) -> None:
    root = fill(tmp_path, FLAT)
    (root / "mine.csv").write_text("a.png,0")
    (root / "notes.txt").write_text("nothing")
    images = open_images(root, PETS)
    with pytest.raises(DatasetError, match="no labels found for the 3 images") as caught:
        with_labels(images)
    assert "--labels mine.csv or notes.txt" in caught.value.hint
    assert "--layout none" in caught.value.hint
    assert with_labels(
        open_images(root, PETS, labelling=Labelling(labels=root / "mine.csv", skip_unlabelled=True))
    )
    assert (
        with_labels(open_images(root, PETS, labelling=Labelling(layout="none"))).labelled is False
    )


@pytest.mark.parametrize("archive", [False, True])
def test_every_format_of_pillow_is_read_by_suffix_or_content(tmp_path: Path, archive: bool) -> None:
    kinds = {"JPEG": ".jfif .jpe .jpg", "PPM": ".ppm .pnm", "PNG": ".apng .dat", "WEBP": ".webp"}
    kinds |= {"AVIF": ".avif", "TIFF": ".tiff", "BMP": ".dib", "JPEG2000": ".jp2", "GIF": ".bak"}
    kinds |= {"TGA": ".vda .tga", "QOI": ".qoi", "SGI": ".sgi .rgb .bw"}
    # Without a suffix, and one that says nothing.
    names = [f"{kind}{suffix}" for kind, all_ in kinds.items() for suffix in all_.split()]
    root = tmp_path / "images"
    root.mkdir()
    for seed, name in enumerate([*names, "PNG", "JPEG.orig"]):
        kind = name.partition(".")[0]
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (seed, 0, 0)).save(stream, kind)
        (root / name).write_bytes(stream.getvalue())
    (root / "BMI of patients").write_text("BMI,23")
    (root / "notes.txt").write_text("no image")
    (root / "movie.mpg").write_bytes(b"\0\0\1\xba")
    (root / "weights.rgb").write_bytes(bytes(range(200)))
    (root / "page.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    path = Path(shutil.make_archive(str(tmp_path / "z"), "zip", root)) if archive else root
    images = open_images(path)
    assert {entry.name for entry in images.entries} == {*names, "PNG", "JPEG.orig"}
    others = ("BMI of patients", "movie.mpg", "notes.txt", "page.eps", "weights.rgb")
    assert survey(images).others.first == others
    assert "5 files are not images and were left out: " in survey(images).problems()[-1]
    spec = Preprocess(8, CLIP_MEAN, CLIP_STD)
    assert len(list(iter_crops(images, spec, workers=0))) == len(images.entries)


def test_hidden_copies_are_left_out_and_named(tmp_path: Path) -> None:
    root = fill(tmp_path, [f"{pet}/a.png" for pet in PETS])
    hidden = [".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/a-checkpoint.png"]
    hidden += ["dog/@eaDir/a.png", "emu/.a.png"]
    fill(root, hidden)
    images = open_images(root, PETS)
    assert labels_of(images) == {"cat/a.png": 0, "dog/a.png": 1, "emu/a.png": 2}
    assert set(survey(images).ignored.first) == {f"{name} is hidden" for name in hidden}


@pytest.mark.parametrize("named", [True, False])
def test_images_without_a_class_are_left_out_if_they_may_be(tmp_path: Path, named: bool) -> None:
    root = fill(tmp_path, [f"{pet}/a.png" for pet in PETS] + ["stray.png"])
    classes = PETS if named else ()
    images = open_images(root, classes, count=3)
    assert survey(images).unlabelled.first == ("stray.png",)
    assert not images.labelled
    images = open_images(root, classes, count=3, labelling=Labelling(skip_unlabelled=True))
    assert images.labelled
    assert survey(images).problems() == ("1 images without a class were left out: stray.png",)


def test_a_folder_that_is_no_class_is_left_out_only_if_it_may_be(tmp_path: Path) -> None:
    root = fill(tmp_path, [f"{pet}/a.png" for pet in PETS] + ["misc/a.png"])
    with pytest.raises(DatasetError, match=r"not classes: misc \(.*--skip-unlabelled"):
        open_images(root, PETS)
    images = open_images(root, PETS, labelling=Labelling(skip_unlabelled=True))
    assert survey(images).skipped.first == ("misc/a.png",)
    assert len(images.entries) == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"layout": "none", "labels": Path("val.txt")},
        {"layout": "folders", "labels": Path("val.txt")},
        {"layout": "none", "first_class": 1},
        {"layout": "none", "skip_unlabelled": True},
        {"first_class": 2},
    ],
)
def test_what_the_user_says_about_labels_may_not_contradict_itself(
    asked: dict[str, object],
) -> None:
    with pytest.raises(UsageError):
        Labelling(**asked)  # type: ignore[arg-type]


def test_a_first_class_is_for_numbers(tmp_path: Path) -> None:
    root = fill(tmp_path / "flat", FLAT)
    (tmp_path / "mine.txt").write_text("a.png cat\nb.png dog\n")
    with pytest.raises(DatasetError, match="remove --first-class"):
        open_images(root, PETS, labelling=Labelling(labels=tmp_path / "mine.txt", first_class=1))
    folders = fill(tmp_path / "folders", [f"{pet}/a.png" for pet in PETS])
    with pytest.raises(DatasetError, match="remove --first-class"):
        open_images(folders, PETS, labelling=Labelling(first_class=1))


def test_the_names_in_a_zip_are_those_of_its_folder(tmp_path: Path) -> None:
    root = numbered(tmp_path / "v2", range(12), "{:02d}")
    packed = tmp_path / "v2.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, path.relative_to(root))
    assert labels_of(open_images(packed, count=12)) == labels_of(open_images(root, count=12))


def test_a_page_for_another_program_is_refused_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    spec = Preprocess(8, CLIP_MEAN, CLIP_STD)
    with pytest.raises(DatasetError, match="the format EPS is not supported"):
        list(iter_crops(open_images(tmp_path), spec, workers=0))


def drawn(root: Path, classes: int, numbers: Sequence[int]) -> ImageFolder:
    """A list of images of these classes of so many; one picture serves for all."""
    root.mkdir(parents=True)
    lines = []
    for index, number in enumerate(numbers):
        (root / f"{index}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        lines.append(f"{index}.png {number}\n")
    (root / "val.txt").write_text("".join(lines))
    return open_images(root, count=classes)


@pytest.mark.parametrize(("classes", "count"), [(10, 8), (10, 30), (100, 60), (100, 400)])
def test_a_random_sample_is_no_part_of_the_classes(
    tmp_path: Path, classes: int, count: int
) -> None:
    generator = np.random.default_rng(0)
    for draw in range(20):
        numbers = generator.integers(classes, size=count).tolist()
        assert drawn(tmp_path / str(draw), classes, numbers).origin.partial == 0
    some = generator.integers(classes // 5, size=count).tolist()
    part = drawn(tmp_path / "some", classes, some)
    # Eight images of ten classes are too few to decide.
    assert part.origin.partial == (0 if count == 8 else len(set(some)))


def test_a_table_without_a_header_loses_no_row(tmp_path: Path) -> None:
    root = fill(tmp_path / "images", FLAT)
    (tmp_path / "mine.csv").write_text("gone.png,cat\na.png,cat\nb.png,emu\nc.png,dog\n")
    images = open_images(root, PETS, labelling=Labelling(labels=tmp_path / "mine.csv"))
    assert images.labelled
    assert survey(images).missing.first == ("gone.png",)
