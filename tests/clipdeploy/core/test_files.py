from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdeploy.core.errors import FileError
from clipdeploy.core.files import (
    atomic_folder,
    atomic_path,
    file_errors,
    read_regular,
    sha256_file,
    write_atomic,
)

# Each runs in a process of its own: a limit, a user or a sudden death must not leak into pytest.
_FILE_TOO_LARGE = """
import resource, signal, sys
from pathlib import Path
from clipdeploy.core.errors import FileError
from clipdeploy.core.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path(sys.argv[1]), bytes(5000))
except FileError as error:
    print(error)
    sys.exit(7)
"""
_NO_PERMISSION = """
import os, sys
from pathlib import Path
from clipdeploy.core.errors import FileError
from clipdeploy.core.files import write_atomic
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    write_atomic(Path(sys.argv[1]), b"new")
except FileError as error:
    print(error)
    sys.exit(7)
"""
_SUDDEN_DEATH = """
import os, sys
from pathlib import Path
from clipdeploy.core.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half of it")
    os._exit(7)
"""


def _run(script: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    return done.stdout


def test_file_appears_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, b"data")
    assert path.read_bytes() == b"data"
    assert os.listdir(path.parent) == ["file.bin"]


def test_nothing_has_the_name_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"data")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_bytes() == b"data"
    assert not temporary.exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("old", [None, b"old"])
def test_interrupted_block_leaves_things_as_they_were(
    tmp_path: Path, error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    before = os.listdir(tmp_path)
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_bytes(b"half of it")
        raise error
    assert os.listdir(tmp_path) == before
    assert old is None or path.read_bytes() == old


def test_block_that_removes_its_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(FileError, match=r"cannot write .*file\.bin"), atomic_path(path) as made:
        made.unlink()
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"")
        assert os.umask(umask) == umask
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_file_limit_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    message = _run(_FILE_TOO_LARGE, path)
    assert f"cannot write {path}: File too large" in message
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_forbidden_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    message = _run(_NO_PERMISSION, folder / "file.bin")
    assert f"cannot write {folder / 'file.bin'}" in message
    assert "no permission: choose a writable folder" in message
    assert os.listdir(folder) == []


def test_sudden_death_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    _run(_SUDDEN_DEATH, path)
    assert path.read_bytes() == b"old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_says_so() -> None:
    path = Path("/dev/full")
    with pytest.raises(FileError, match="No space left") as found, file_errors("write", path):
        path.write_bytes(b"data")
    assert found.value.hint.startswith("the disk is full")
    assert isinstance(found.value.__cause__, OSError)


def test_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    with pytest.raises(FileError, match="Is a directory"):
        write_atomic(tmp_path / "name", b"data")
    assert os.listdir(tmp_path) == ["name"]


def test_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"old")
    with pytest.raises(FileError, match="cannot write"):
        write_atomic(tmp_path / "name" / "file", b"data")
    assert (tmp_path / "name").read_bytes() == b"old"


def test_file_errors_lets_other_errors_pass() -> None:
    with pytest.raises(KeyError), file_errors("read", Path("x")):
        raise KeyError("x")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 3])
def test_sha256_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_sha256_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*absent") as found:
        sha256_file(tmp_path / "absent")
    assert "check its spelling" in found.value.hint


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "file").write_bytes(b"whole")
        assert not path.exists()
    assert (path / "deep" / "file").read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o700 == 0o700


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("old", "new"):
        with atomic_folder(path) as temporary:
            (temporary / name).write_text(name)
    assert [file.name for file in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, OSError])
def test_an_interrupted_folder_leaves_the_old_one(
    failure: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")

    def fail() -> None:
        with atomic_folder(path) as temporary:
            (temporary / "new").write_text("half")
            raise failure

    with pytest.raises(FileError if failure is OSError else failure):
        fail()
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def _special(kind: str, path: Path) -> Path:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path.name)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle", "nothing"])
@pytest.mark.parametrize("read", [read_regular, sha256_file])
def test_only_regular_files_are_read(
    read: Callable[[Path], object], kind: str, tmp_path: Path
) -> None:
    """A pipe without a writer would be waited for, and /dev/zero has no end."""
    path = _special(kind, tmp_path / "x.json")
    with pytest.raises(FileError, match=r"cannot read .*x\.json") as found:
        read(path)
    assert found.value.hint


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(FileError, match="more than 4 bytes"):
        read_regular(path, 4)
    with path.open("wb") as stream:
        stream.truncate(1 << 32)  # a hole, which takes no space on the disk
    with pytest.raises(FileError, match="more than 2,147,483,648 bytes"):
        read_regular(path)


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux")
def test_a_file_without_a_size_is_read() -> None:
    assert read_regular(Path("/proc/cpuinfo")) == Path("/proc/cpuinfo").read_bytes()
