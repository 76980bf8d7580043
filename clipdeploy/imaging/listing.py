"""List the files of a folder, a zip or a plain tar.

An archive is refused if it is truncated, contains a name twice, or has a path outside itself.
"""

from __future__ import annotations

import os
import struct
import tarfile
import zipfile
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.archives import Place, TarPlace, ZipPlace

__all__ = ["File", "Listing", "list_files"]

_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# Bytes read after a tar's end mark: padding is zeros, a second tar appended to the first is not.
_AFTER_END = 64 << 10
# Raised by zipfile and tarfile for damaged archives.
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    struct.error,
    EOFError,
    NotImplementedError,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class File:
    """A file's path inside the folder or archive, and its position in an archive."""

    name: str
    place: Place | None = None


@dataclass(frozen=True)
class Listing:
    """Every file, and a sentence about each entry left out, such as links, devices and pipes."""

    files: tuple[File, ...]
    ignored: tuple[str, ...]


def list_files(path: Path) -> Listing:
    """List the files of a folder, a zip or a plain tar.

    Raises:
        DatasetError: the archive is compressed or damaged, contains a name twice or a path outside
            itself, or the folder cannot be listed.
    """
    if path.is_dir():
        return _list_folder(path)
    try:
        if not path.is_file():
            raise DatasetError(f"{path} is neither a folder nor a file")
        with path.open("rb") as stream:
            head = stream.read(_BLOCK)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from error
    for magic, method in _COMPRESSED.items():
        if head.startswith(magic):
            raise DatasetError(
                f"{path} is compressed with {method}, so single images cannot be read from it",
                hint="decompress it to a plain .tar, or unpack it",
            )
    try:
        # A self-extracting zip starts with a program; a tar may end with a zip member.
        is_tar = head[257:262] == b"ustar"
        is_zip = head.startswith(b"PK") or (not is_tar and zipfile.is_zipfile(path))
        listing = _list_zip(path) if is_zip else _list_tar(path)
    except (*_BROKEN, OSError) as error:
        raise DatasetError(
            f"{path} is not a readable zip or tar archive: {error}",
            hint="pass a folder, a zip or a tar of images",
        ) from error
    for name, count in Counter(file.name for file in listing.files).items():
        if count > 1:
            raise DatasetError(
                f"{path} contains {name} {count} times", hint="create the archive again"
            )
    return listing


def _inside(path: Path, name: str) -> str:
    """Normalise a member's name; refuse a path outside the archive."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or name[1:3] == ":/":
        raise DatasetError(
            f"{path} contains a path outside the archive: {name!r}",
            hint="create the archive again with relative paths",
        )
    return pure.as_posix()


def _list_zip(path: Path) -> Listing:
    files: list[File] = []
    ignored: list[str] = []
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # Some Windows programs write backslashes, against the specification.
            name = _inside(path, info.filename.replace("\\", "/"))
            # The high half of the external attributes is the Unix mode; S_IFLNK is a link.
            if (info.external_attr >> 16) & 0xF000 == 0xA000:
                ignored.append(f"{name} is a link")
            elif not info.is_dir():
                where = (info.header_offset, info.file_size, info.compress_size)
                kind = (info.compress_type, info.flag_bits, info.CRC)
                files.append(File(name, ZipPlace(*where, *kind)))
    return Listing(tuple(files), tuple(ignored))


def _list_tar(path: Path) -> Listing:
    ignored: list[str] = []
    with path.open("rb") as stream:
        members = _tar_members(path, stream, (0, path.stat().st_size), "", ignored)
        # ILSVRC2012_img_train.tar contains one tar per class.
        for name, place in [item for item in members if item[0].endswith(".tar")]:
            prefix = name.removesuffix(".tar") + "/"
            span = (place.offset, place.offset + place.size)
            members += _tar_members(path, stream, span, prefix, ignored)
    return Listing(tuple(File(*member) for member in members), tuple(ignored))


def _tar_members(
    path: Path, stream: BinaryIO, span: tuple[int, int], prefix: str, ignored: list[str]
) -> list[tuple[str, TarPlace]]:
    """The files of the tar in the bytes ``span`` (start, end) of ``stream``."""
    members = []
    stream.seek(span[0])
    with tarfile.open(fileobj=stream, mode="r:") as archive:
        while (member := archive.next()) is not None:
            name = prefix + _inside(path, member.name)
            if member.issym() or member.islnk():
                ignored.append(f"{name} is a link")
            elif member.isreg() and not member.issparse():
                members.append((name, TarPlace(member.offset_data, member.size)))
            elif not member.isdir():
                ignored.append(f"{name} is not a regular file")
        # tarfile treats a damaged header as the end; check that it is the end.
        stream.seek(archive.offset)
    mark = stream.read(_BLOCK)
    if archive.offset + _BLOCK > span[1] or any(mark):
        raise ValueError(
            f"it is truncated or damaged at byte {archive.offset}, before the end mark"
        )
    if not prefix and any(stream.read(_AFTER_END)):
        raise ValueError(f"more data follows the end mark at byte {archive.offset}")
    return members


def _list_folder(root: Path) -> Listing:
    walk = _Walk(root)
    walk.run()
    return Listing(tuple(File(name) for name in walk.files), tuple(walk.ignored))


@dataclass
class _Walk:
    """Lists each folder once; links to folders come last, so that a loop of links ends."""

    root: Path
    files: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def run(self) -> None:
        # A link to a folder above the root would list everything below that folder.
        seen = {self._identity(folder) for folder in self.root.resolve().parents}
        folders, links = deque([""]), deque[str]()
        while folders or links:
            prefix = folders.popleft() if folders else links.popleft()
            identity = self._identity(self.root / prefix)
            if identity in seen:
                self.ignored.append(f"{prefix[:-1]} is a link to a folder that is listed already")
                continue
            seen.add(identity)
            for entry in self._scan(self.root / prefix):
                name = prefix + entry.name
                if self._is_folder(entry):
                    (links if entry.is_symlink() else folders).append(f"{name}/")
                else:
                    self._add(entry, name)

    def _add(self, entry: os.DirEntry[str], name: str) -> None:
        try:
            # List a broken link too, so that reading it reports its name.
            regular = entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
        except OSError:  # a link to itself
            regular = True
        if regular:
            self.files.append(name)
        else:
            self.ignored.append(f"{name} is not a regular file")

    @staticmethod
    def _is_folder(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    @staticmethod
    def _identity(folder: Path) -> tuple[int, int]:
        try:
            state = folder.stat()
        except OSError as error:
            raise DatasetError(f"cannot list {folder}: {error.strerror}") from error
        return state.st_dev, state.st_ino

    @staticmethod
    def _scan(folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise DatasetError(f"cannot list {folder}: {error.strerror}") from error
