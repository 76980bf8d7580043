"""Images, archives and labels as nobody wants them: named, nothing lost, no crash."""

from __future__ import annotations

import random
import struct
import tarfile
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from verify_command import good, refused, verify


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 black pixels, 10.8 GB in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_images_that_cannot_be_read(artifacts: Path, digits: Path) -> None:
    whole = next((digits / "3").glob("*.png")).read_bytes()
    bad = {
        "0/bomb.png": bomb(),
        "1/cut.png": whole[:-40],
        "2/empty.png": b"",
        "3/text.jpg": b"this is no image",
        "4/noise.png": random.Random(0).randbytes(300),
    }
    for name, data in bad.items():
        (digits / name).write_bytes(data)
    (digits / "5" / "notes.txt").write_text("no image, and does not call itself one")
    at = ("--max-drop", "4", "--workers", "0")
    refused(verify(artifacts, *at, data=digits), 1, "0/bomb.png", "--skip-unreadable")
    result = verify(artifacts, *at, "--skip-unreadable", "--json", data=digits)
    found = good(result)
    assert found["skipped"] == sorted(bad)
    assert (found["listed"], found["images"]) == (105, 100)
    assert any(problem.startswith("5 images cannot be read: ") for problem in found["problems"])
    for name in bad:
        assert f"skipped, unreadable: {name}" in result.stderr
    # They are known beside the records: a resumed run says it again.
    again = verify(artifacts, *at, "--skip-unreadable", "--json", data=digits)
    assert again.stdout == result.stdout


def test_not_one_image_can_be_read(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "bad" / "3").mkdir(parents=True)
    (tmp_path / "bad" / "3" / "x.png").write_bytes(b"")
    result = verify(artifacts, "--skip-unreadable", data=tmp_path / "bad")
    refused(result, 1, "no image of", "could be read")


def test_links_in_a_circle(artifacts: Path, digits: Path) -> None:
    (digits / "4" / "around").symlink_to(digits, target_is_directory=True)
    (digits / "4" / "self.png").symlink_to("self.png")
    at = ("--max-drop", "4", "--workers", "0", "--skip-unreadable", "--json")
    result = verify(artifacts, *at, data=digits)
    found = good(result)
    assert found["images"] == 100
    assert found["skipped"] == ["4/self.png"]
    assert any(
        problem.endswith("4/around is a link to a folder that is listed already")
        for problem in found["problems"]
    )


@pytest.mark.parametrize("name", ["../0/evil.png", "/0/evil.png", "0/../../evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_archives_that_reach_outside(
    name: str, kind: str, artifacts: Path, digits: Path, tmp_path: Path
) -> None:
    image = next((digits / "0").glob("*.png")).read_bytes()
    path = tmp_path / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("0/good.png", image)
            archive.writestr(name, image)
    else:
        with tarfile.open(path, "w") as archive_:
            for each in ("0/good.png", name):
                member = tarfile.TarInfo(each)
                member.size = len(image)
                archive_.addfile(member, BytesIO(image))
    result = verify(artifacts, data=path)
    refused(result, 1, "evil.png")
    assert not list(tmp_path.rglob("evil.png"))


@pytest.fixture
def flat(digits: Path) -> tuple[Path, list[str]]:
    """The same digits in one folder, and the lines of their label file."""
    lines = []
    for path in sorted(digits.rglob("*.png")):
        lines.append(f"{path.name} {path.parent.name}")
        path.rename(digits / path.name)
    return digits, lines


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.replace(line.split()[1], "10"), "10"),
        (lambda line: line.replace(" " + line.split()[1], " -1"), "-1"),
        (lambda line: line.split()[0], "1"),
        (
            lambda line: line + "\n" + line.split()[0] + " " + str(9 - int(line.split()[1])),
            "line 6",
        ),
    ],
    ids=["too large", "negative", "missing", "twice"],
)
def test_bad_label_files(
    change: Any, said: str, flat: tuple[Path, list[str]], artifacts: Path
) -> None:
    folder, lines = flat
    bad = [*lines[:4], change(lines[4]), *lines[5:]]
    (folder / "val.txt").write_text("\n".join(bad) + "\n")
    refused(verify(artifacts, data=folder), 1, "val.txt", said)


def test_gaps_in_a_label_file(flat: tuple[Path, list[str]], artifacts: Path) -> None:
    folder, lines = flat
    (folder / "val.txt").write_text("\n".join([*lines[:-3], "gone.png 3"]) + "\n")
    at = ("--max-drop", "4", "--workers", "0", "--json")
    refused(verify(artifacts, *at, data=folder), 1, "3 of 100 images have no class: ")
    result = verify(artifacts, *at, "--skip-unlabelled", data=folder)
    assert "3 images without a class were left out: " in result.stderr
    assert "1 listed images do not exist: gone.png" in result.stderr
    assert good(result)["images"] == 97
    (folder / "val.txt").write_text("\n".join(lines) + "\n")
    assert good(verify(artifacts, "--max-drop", "4", "--json", data=folder))["images"] == 100
