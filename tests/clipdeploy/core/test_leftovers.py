"""What killed writers leave is removed, and what living ones write is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipdeploy.core.files import atomic_folder, atomic_path, restore_folders, write_atomic
from clipdeploy.core.leftovers import claimed, remove_leftovers, scratch_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")

# Each writes half of it, says so, and waits to be killed.
FILE = """
import sys, time
from pathlib import Path
from clipdeploy.core.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half of it")
    print("half", flush=True)
    time.sleep(600)
"""
FOLDER = FILE.replace("atomic_path", "atomic_folder").replace(
    "temporary.write", "(temporary / 'file').write"
)
SCRATCH = """
import time
from clipdeploy.core.leftovers import scratch_folder
with scratch_folder() as folder:
    (folder / "file").write_bytes(b"half of it")
    print("half", flush=True)
    time.sleep(600)
"""


@contextmanager
def writer(script: str, *words: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of its writing."""
    command = [sys.executable, "-c", script, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        yield process
        process.kill()


def killed(script: str, *words: Path) -> None:
    with writer(script, *words) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_the_next_writer_removes_what_killed_ones_left(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    for _ in range(3):
        killed(FILE, path)
    # The second and the third have each removed what was there before them.
    assert len(os.listdir(tmp_path)) == 1
    write_atomic(path, b"whole")
    assert os.listdir(tmp_path) == ["graph.onnx"]


def test_the_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    with writer(FILE, path):
        write_atomic(path, b"mine")
        (theirs,) = tmp_path.glob(".*.part")
        assert theirs.read_bytes() == b"half of it"
    write_atomic(path, b"mine again")
    assert os.listdir(tmp_path) == ["graph.onnx"]


def test_two_writers_in_one_process(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    with atomic_path(path) as first:
        first.write_bytes(b"first")
        write_atomic(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"


def test_the_files_of_other_names_stay(tmp_path: Path) -> None:
    for name in (".graph.onnx.json.abcdefgh.part", ".graph.onnx.part", "graph.onnx.abcdefgh.part"):
        (tmp_path / name).write_bytes(b"not of graph.onnx")
    write_atomic(tmp_path / "graph.onnx", b"")
    assert len(os.listdir(tmp_path)) == 4


def test_a_name_full_of_wildcards(tmp_path: Path) -> None:
    (tmp_path / ".a.abcdefgh.part").write_bytes(b"not of [a-z]")
    killed(FILE, tmp_path / "[a-z]")
    write_atomic(tmp_path / "[a-z]", b"")
    assert sorted(os.listdir(tmp_path)) == [".a.abcdefgh.part", "[a-z]"]


def test_half_a_folder_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "package"
    killed(FOLDER, path)
    assert len(os.listdir(tmp_path)) == 1
    with writer(FOLDER, path):
        assert len(os.listdir(tmp_path)) == 1
        with atomic_folder(path) as made:
            (made / "file").write_bytes(b"whole")
        assert len(os.listdir(tmp_path)) == 2
    with atomic_folder(path):
        pass
    assert os.listdir(tmp_path) == ["package"]


def test_a_replaced_folder_stays_until_there_is_a_new_one(tmp_path: Path) -> None:
    old = tmp_path / ".package.abcdefgh.old"
    old.mkdir()
    (old / "file").write_bytes(b"killed between the two renames")
    with atomic_folder(tmp_path / "package"):
        assert (old / "file").exists()
    assert not old.exists()


REPLACED = """
import os, sys
from pathlib import Path
from clipdeploy.core.files import atomic_folder
def die(event, words):
    if event == "os.rename" and str(words[1]) == sys.argv[1]:
        print("half", flush=True)
        os.kill(os.getpid(), 9)
sys.addaudithook(die)
with atomic_folder(Path(sys.argv[1])) as made:
    (made / "file").write_bytes(b"new")
"""


def test_a_folder_moved_aside_is_put_back(tmp_path: Path) -> None:
    path = tmp_path / "1"
    with atomic_folder(path) as made:
        (made / "file").write_bytes(b"old")
    killed(REPLACED, path)
    assert not path.exists()
    restore_folders(tmp_path)
    assert (path / "file").read_bytes() == b"old"
    with atomic_folder(path) as made:
        (made / "file").write_bytes(b"newer")
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


def test_only_a_whole_folder_of_the_dead_is_put_back(tmp_path: Path) -> None:
    half_removed = tmp_path / ".1.abcdefgh.old"
    half_removed.mkdir()
    in_use = tmp_path / ".2.abcdefgh.old"
    in_use.mkdir()

    def make() -> Path:
        part = in_use.with_suffix(".part")
        part.mkdir()
        return part

    with claimed(make):
        restore_folders(tmp_path)
        assert not (tmp_path / "1").exists()
        assert not (tmp_path / "2").exists()
    restore_folders(tmp_path)
    assert (tmp_path / "2").exists()
    restore_folders(tmp_path / "absent")


def test_a_scratch_folder_outlives_its_process_until_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "clipdeploy-artifact").mkdir()
    killed(SCRATCH)
    assert len(os.listdir(tmp_path)) == 2
    with writer(SCRATCH), scratch_folder() as mine:
        assert mine.parent == tmp_path
        assert len(os.listdir(tmp_path)) == 3
    with scratch_folder():
        pass
    assert os.listdir(tmp_path) == ["clipdeploy-artifact"]


def test_what_is_taken_before_it_is_held_is_made_again(tmp_path: Path) -> None:
    """A sweep that comes between the making and the lock does no harm."""
    made: list[Path] = []

    def make() -> Path:
        path = tmp_path / f"part{len(made)}"
        path.write_bytes(b"")
        made.append(path)
        if len(made) == 1:
            remove_leftovers(tmp_path, "part*")
        return path

    with claimed(make) as held:
        assert held == made[1]
        remove_leftovers(tmp_path, "part*")
        assert held.exists()
    remove_leftovers(tmp_path, "part*")
    assert not held.exists()


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    killed(FILE, tmp_path / "file")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    write_atomic(tmp_path / "file", b"whole")
    assert len(os.listdir(tmp_path)) == 2
