"""Images in archives, among them damaged and hostile ones.

Covers: clipdeploy/imaging/listing.py.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.archives import Reader
from clipdeploy.imaging.listing import list_files

# Sizes around a tar block; names around the 100 bytes of a ustar header.
CONTENTS = {
    "cat/empty.png": b"",
    "cat/511.png": random.Random(0).randbytes(511),
    "cat/512.png": random.Random(1).randbytes(512),
    "dog/zeros.png": bytes(70_000),
    f"dog/{'n' * 120}.png": b"a long name",
    "dog/\u732b.png": b"a name that is not ASCII",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name, data in CONTENTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def pack_zip(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def pack_tar(folder: Path, kind: int = tarfile.PAX_FORMAT) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w", format=kind) as archive:
        archive.add(folder, ".")
    return path


def contents(path: Path) -> dict[str, bytes]:
    reader = Reader(path)
    try:
        return {file.name: reader.read(file.name, file.place) for file in list_files(path).files}
    finally:
        reader.close()


@pytest.mark.parametrize(
    "pack",
    [
        lambda folder: folder,
        pack_zip,
        lambda folder: pack_zip(folder, zipfile.ZIP_STORED),
        pack_tar,
        lambda folder: pack_tar(folder, tarfile.GNU_FORMAT),
    ],
    ids=["folder", "deflated zip", "stored zip", "pax tar", "gnu tar"],
)
def test_every_file_is_read_as_it_was_written(folder: Path, pack: Callable[[Path], Path]) -> None:
    assert contents(pack(folder)) == CONTENTS


@pytest.mark.parametrize("pack", [pack_zip, pack_tar])
def test_threads_read_one_archive_at_the_same_time(
    folder: Path, pack: Callable[[Path], Path]
) -> None:
    path = pack(folder)
    files = list_files(path).files * 50
    reader = Reader(path)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda file: reader.read(file.name, file.place), files))
    reader.close()
    assert read == [CONTENTS[file.name] for file in files]


def test_a_tar_of_class_tars_gives_class_folders(folder: Path) -> None:
    """The layout of ILSVRC2012_img_train.tar."""
    outer = folder.parent / "train.tar"
    with tarfile.open(outer, "w") as archive:
        for name in ("cat", "dog"):
            with tarfile.open(folder.parent / f"{name}.tar", "w") as inner:
                for file in sorted((folder / name).iterdir()):
                    inner.add(file, file.name)
            archive.add(folder.parent / f"{name}.tar", f"{name}.tar")
    found = contents(outer)
    assert {name: data for name, data in found.items() if name.endswith(".png")} == CONTENTS


def test_a_truncated_class_tar_is_refused(folder: Path) -> None:
    """Otherwise the headers after it would be read as its own."""
    outer, inner = folder.parent / "train.tar", folder.parent / "cat.tar"
    with tarfile.open(inner, "w") as archive:
        archive.add(folder / "cat" / "511.png", "511.png")
    os.truncate(inner, 1024)  # the file is whole, the end mark is gone
    with tarfile.open(outer, "w") as archive:
        archive.add(inner, "cat.tar")
        archive.add(folder / "cat" / "512.png", "512.png")
    with pytest.raises(DatasetError, match="truncated or damaged"):
        list_files(outer)


def test_a_self_extracting_zip_is_read(folder: Path) -> None:
    path = pack_zip(folder)
    path.write_bytes(b"#!/bin/sh\nexit 0\n" + path.read_bytes())
    assert contents(path) == CONTENTS


def test_backslashes_in_a_zip_from_windows_separate_folders(tmp_path: Path) -> None:
    path = tmp_path / "windows.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat\\0.png", b"x")
    assert contents(path) == {"cat/0.png": b"x"}


def add_member(path: Path, name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        member.size = 1 if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(b"x"))


@pytest.mark.parametrize("name", ["/etc/passwd.png", "../evil.png", "cat/../../evil.png"])
def test_an_archive_cannot_reach_outside_itself(tmp_path: Path, name: str) -> None:
    zipped, tarred = tmp_path / "evil.zip", tmp_path / "evil.tar"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(name, b"x")
    add_member(tarred, name)
    for path in (zipped, tarred):
        with pytest.raises(DatasetError, match=r"outside the archive: .*(evil|passwd)"):
            list_files(path)


@pytest.mark.parametrize("name", ["..\\evil.png", "C:\\evil.png"])
def test_an_archive_cannot_reach_outside_itself_on_windows(tmp_path: Path, name: str) -> None:
    path = tmp_path / "evil.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DatasetError, match="a path outside the archive"):
        list_files(path)


def test_links_in_archives_are_left_out_and_named(tmp_path: Path) -> None:
    tarred = tmp_path / "links.tar"
    with tarfile.open(tarred, "w") as archive:
        for name, kind in (("soft.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        pipe = tarfile.TarInfo("pipe.png")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
        kept = tarfile.TarInfo("kept.png")
        archive.addfile(kept, io.BytesIO())
    zipped = tmp_path / "links.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        info = zipfile.ZipInfo("soft.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
        archive.writestr("kept.png", b"")
    for path, ignored in (
        (tarred, ("soft.png is a link", "hard.png is a link", "pipe.png is not a regular file")),
        (zipped, ("soft.png is a link",)),
    ):
        listing = list_files(path)
        assert listing.ignored == ignored
        assert [file.name for file in listing.files] == ["kept.png"]


def test_a_duplicate_name_in_an_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("cat.png"))
        archive.addfile(tarfile.TarInfo("./cat.png"))
    with pytest.raises(DatasetError, match=r"contains cat\.png 2 times"):
        list_files(path)


@pytest.mark.parametrize("open_as", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_with_a_hint(folder: Path, open_as: str) -> None:
    path = folder.parent / "images.tar.x"
    with tarfile.open(path, open_as) as archive:
        archive.add(folder, ".")
    with pytest.raises(DatasetError, match=r"compressed with \w+.*decompress it to a plain \.tar"):
        list_files(path)


def test_a_decompressed_tar_is_read(folder: Path) -> None:
    packed = gzip.compress(pack_tar(folder).read_bytes())
    plain = folder.parent / "plain.tar"
    plain.write_bytes(gzip.decompress(packed))
    assert contents(plain) == CONTENTS


def test_a_tar_truncated_anywhere_is_refused(folder: Path) -> None:
    path = pack_tar(folder)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset_data + 1024
    # At and beside every block, up to the end mark; two blocks of zeros and padding follow.
    for size in {cut + shift for cut in range(0, end, 512) for shift in (0, 1, 511)}:
        if size < end - 512:
            path.write_bytes(whole[:size])
            with pytest.raises(DatasetError, match=r"not a readable zip or tar"):
                list_files(path)


def test_a_damaged_header_does_not_end_a_tar_early(folder: Path) -> None:
    path = pack_tar(folder)
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        middle = archive.getmembers()[3].offset
    data[middle + 5] ^= 0xFF
    path.write_bytes(data)
    # tarfile itself reports nothing: without the check the other members would be lost.
    with tarfile.open(path) as archive:
        assert len(archive.getmembers()) == 3
    with pytest.raises(DatasetError, match=f"truncated or damaged at byte {middle}"):
        list_files(path)


def test_two_concatenated_tars_are_refused(folder: Path) -> None:
    path = pack_tar(folder)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DatasetError, match="more data follows the end mark"):
        list_files(path)


def test_a_tar_rewritten_after_it_was_listed_gives_an_error(
    folder: Path,
) -> None:
    path = pack_tar(folder)
    before = list_files(path).files
    (folder / "cat" / "000.png").write_bytes(bytes(600))
    pack_tar(folder)
    reader = Reader(path)
    refused = []
    for file in before:
        try:
            assert reader.read(file.name, file.place) == CONTENTS[file.name]
        except DatasetError as error:
            refused.append(str(error))
    reader.close()
    assert refused
    assert all("changed since it was listed" in text for text in refused)


def test_a_damaged_zip_member_is_found_when_it_is_read(folder: Path) -> None:
    path = pack_zip(folder, zipfile.ZIP_STORED)
    files = {file.name: file for file in list_files(path).files}
    data = bytearray(path.read_bytes())
    at = data.index(CONTENTS["cat/512.png"]) + 100
    data[at] ^= 1
    path.write_bytes(data)
    reader = Reader(path)
    with pytest.raises(DatasetError, match=r"cat/512\.png: its CRC-32"):
        reader.read("cat/512.png", files["cat/512.png"].place)
    assert reader.read("cat/511.png", files["cat/511.png"].place) == CONTENTS["cat/511.png"]
    reader.close()


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_zip_is_refused(folder: Path, keep: float) -> None:
    path = pack_zip(folder)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DatasetError, match="not a readable zip"):
        list_files(path)


def test_noise_is_not_an_archive(tmp_path: Path) -> None:
    for seed in range(40):
        generator = np.random.default_rng(seed)
        path = tmp_path / "noise"
        head = (b"", b"PK\x03\x04")[seed % 2]
        path.write_bytes(head + generator.bytes(int(generator.integers(0, 4000))))
        with pytest.raises(DatasetError, match="not a readable zip"):
            list_files(path)


def directory_field(path: Path, offset: int, value: int) -> None:
    """Write a 16-bit field of the first entry of a zip's central directory."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, data.index(b"PK\x01\x02") + offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [(8, 1, "it is encrypted"), (10, 14, "its zip method 14 is neither stored nor deflated")],
)
def test_an_unsupported_zip_member_is_named(
    tmp_path: Path, offset: int, value: int, reason: str
) -> None:
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat.png", b"x")
    directory_field(path, offset, value)
    (file,) = list_files(path).files
    reader = Reader(path)
    with pytest.raises(DatasetError, match=rf"cat\.png: {reason}"):
        reader.read(file.name, file.place)
    reader.close()


def test_a_member_larger_than_its_stated_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(1 << 20))
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02")
    # Its directory entry states 1000 bytes and the CRC-32 of 1000 zeros.
    struct.pack_into("<I", data, at + 16, zlib.crc32(bytes(1000)))
    struct.pack_into("<I", data, at + 24, 1000)
    path.write_bytes(data)
    (file,) = list_files(path).files
    reader = Reader(path)
    with pytest.raises(DatasetError, match=r"bomb\.png"):
        reader.read(file.name, file.place)
    reader.close()


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 1 << 40)  # sparse: it takes no room
    reader = Reader(tmp_path)
    with pytest.raises(
        DatasetError, match=r"huge\.png: its size of 1048576 MiB is above the limit of 512 MiB"
    ):
        reader.read("huge.png")


def test_links_between_folders_are_followed_once(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.png").write_bytes(b"far")
    (folder / "bird").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere)
    (folder / "cat" / "loop").symlink_to(folder)
    (folder / "cat" / "up").symlink_to("/")
    (folder / "dog" / "kitten").symlink_to(folder / "cat")
    listing = list_files(folder)
    names = {file.name for file in listing.files}
    assert names == {*CONTENTS, "again/far.png"}
    assert sorted(text.partition(" ")[0] for text in listing.ignored) == [
        "bird",
        "cat/loop",
        "cat/up",
        "dog/kitten",
    ]


def test_broken_links_are_listed_and_pipes_are_not(folder: Path) -> None:
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    (folder / "good.png").symlink_to(folder / "cat" / "511.png")
    os.mkfifo(folder / "pipe.png")
    listing = list_files(folder)
    assert {file.name for file in listing.files} == {*CONTENTS, "gone.png", "self.png", "good.png"}
    assert listing.ignored == ("pipe.png is not a regular file",)
    reader = Reader(folder)
    assert reader.read("good.png") == CONTENTS["cat/511.png"]
    for name, reason in (("gone.png", "No such file"), ("self.png", "symbolic links")):
        with pytest.raises(DatasetError, match=f"{name}: .*{reason}"):
            reader.read(name)


def test_neither_a_folder_nor_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DatasetError, match="neither a folder nor a file"):
        list_files(tmp_path / "pipe")
