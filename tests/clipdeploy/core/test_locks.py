"""Two writers of one file: the second is refused and learns who the first is."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipdeploy.core import leftovers
from clipdeploy.core.errors import FileError
from clipdeploy.core.locks import remove_abandoned_lock, sole_writer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX locks")

WHAT = "clipdeploy verify"
# Holds the lock, says so, and waits to be killed.
HOLDER = """
import sys, time
from pathlib import Path
from clipdeploy.core.locks import sole_writer
with sole_writer(Path(sys.argv[1]), "clipdeploy verify"):
    print("held", flush=True)
    time.sleep(600)
"""
# Adds a line in two halves while it holds the lock, again and again; counts the refusals.
RIVAL = """
import sys
from pathlib import Path
from clipdeploy.core.errors import FileError
from clipdeploy.core.locks import sole_writer
path, done = Path(sys.argv[1]), 0
while done < 200:
    try:
        with sole_writer(path, "rival"):
            count = int(path.read_text() or 0)
            path.write_text(str(count + 1))
            done += 1
    except FileError as error:
        assert "is being written by" in str(error), error
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "verification.jsonl.partial"


def lock_of(path: Path) -> Path:
    return path.parent / f".{path.name}.lock"


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of ``path``."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def refusal(path: Path) -> str:
    """What a second writer is answered."""
    with pytest.raises(FileError) as caught, sole_writer(path, "clipdeploy deploy"):
        pass
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_process_learns_who_writes(path: Path) -> None:
    with holder(path) as process:
        said = refusal(path)
    who = rf"process {process.pid} on {re.escape(socket.gethostname())} since \d\d:\d\d"
    expected = rf"{re.escape(str(path))} is being written by `{WHAT}` \({who}\)"
    assert re.match(expected, said), said
    assert "wait until it has finished, or use another --workspace" in said


def test_the_lock_of_a_killed_holder_is_free(path: Path) -> None:
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert lock_of(path).exists()
    with sole_writer(path, WHAT):
        # The next one signs with its own name.
        assert json.loads(lock_of(path).read_text())["pid"] == os.getpid()
    assert os.listdir(path.parent) == []


def test_only_the_lock_of_a_killed_holder_is_removed(path: Path) -> None:
    with holder(path) as process:
        remove_abandoned_lock(path)
        assert lock_of(path).exists()
        assert "is being written by" in refusal(path)
        process.kill()
        process.wait()
        assert lock_of(path).exists()
        remove_abandoned_lock(path)
    assert os.listdir(path.parent) == []
    # Nothing to do.
    remove_abandoned_lock(path)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_lock_goes_with_the_block(path: Path, error: type[BaseException] | None) -> None:
    for _ in range(2):
        try:
            with sole_writer(path, WHAT):
                assert lock_of(path).exists()
                if error:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
        assert os.listdir(path.parent) == []


def test_two_threads_of_one_process_exclude_each_other(path: Path) -> None:
    answers: list[str] = []
    with sole_writer(path, WHAT):
        thread = threading.Thread(target=lambda: answers.append(refusal(path)))
        thread.start()
        thread.join()
        # The same thread as well: a block inside a block would free the lock of the outer one.
        answers.append(refusal(path))
    assert len(answers) == 2
    assert all(f"(process {os.getpid()} on" in said for said in answers)


def test_another_file_is_free(path: Path) -> None:
    with sole_writer(path, WHAT), sole_writer(path.with_name("calibration.partial"), WHAT):
        pass
    assert os.listdir(path.parent) == []


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "new" / "clip-vit-demo" / "file", WHAT):
        pass
    assert os.listdir(tmp_path / "new" / "clip-vit-demo") == []


def test_a_forked_child_does_not_hold_on_to_it(path: Path) -> None:
    reader, writer = os.pipe()
    with sole_writer(path, WHAT):
        child = os.fork()
        if child == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    try:
        # The child is still there, and its parent has left the block.
        with sole_writer(path, WHAT):
            pass
    finally:
        os.close(writer)
        os.waitpid(child, 0)
        os.close(reader)


def test_a_forked_child_that_leaves_the_block_frees_nothing(path: Path) -> None:
    with sole_writer(path, WHAT):
        child = os.fork()
        if child == 0:
            try:
                with sole_writer(path.with_name("other"), WHAT):
                    pass
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert f"(process {os.getpid()} on" in refusal(path)


def test_rivals_never_write_at_once(path: Path) -> None:
    # Each adds 200 to the count that it reads: one that came between would lose some of them. Locks
    # are made and removed all the while, which is where a careless one lets two in.
    path.write_text("0")
    rivals = [subprocess.Popen([sys.executable, "-c", RIVAL, str(path)]) for _ in range(3)]
    assert [rival.wait() for rival in rivals] == [0, 0, 0]
    assert path.read_text() == "600"
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"what": "x"}', b"\xff", b"null"])
def test_a_lock_without_a_name_is_still_a_lock(path: Path, content: bytes) -> None:
    with sole_writer(path, WHAT):
        lock_of(path).write_bytes(content)
        assert "is being written by another process" in refusal(path)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_is_an_error_that_names_it(path: Path) -> None:
    path.parent.chmod(0o555)
    try:
        said = rf"cannot lock {re.escape(str(path))}: Permission denied"
        with pytest.raises(FileError, match=said), sole_writer(path, WHAT):
            pass
    finally:
        path.parent.chmod(0o755)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs sysfs")
def test_a_file_system_that_takes_no_file_is_an_error_that_names_it() -> None:
    # Root as well makes no file there.
    with (
        pytest.raises(FileError, match=r"cannot lock /sys/kernel/verification\.jsonl: ") as caught,
        sole_writer(Path("/sys/kernel/verification.jsonl"), WHAT),
    ):
        pass
    assert caught.value.exit_code == 1
    assert caught.value.hint


def test_a_parent_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"cannot lock .*file/inside"),
        sole_writer(tmp_path / "file" / "inside", WHAT),
    ):
        pass


def test_without_locks_there_is_no_protection(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As the kernel answers on a file system without flock; none can be mounted in a test.
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(leftovers.fcntl, "flock", unsupported)
    with sole_writer(path, WHAT), sole_writer(path, WHAT):
        pass
    assert os.listdir(path.parent) == []
    monkeypatch.undo()
    assert fcntl.flock is leftovers.fcntl.flock
    with sole_writer(path, WHAT):
        refusal(path)


def test_a_deleted_lock_of_ours_does_not_take_the_next_ones(path: Path) -> None:
    with sole_writer(path, WHAT):
        lock_of(path).unlink()
        process_lock = lock_of(path)
        process_lock.write_text("somebody else's")
    assert process_lock.read_text() == "somebody else's"
