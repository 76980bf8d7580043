"""What the processes of pytest-xdist share is made once, and no test changes it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_once import MadeOnce, shared_root


@pytest.fixture
def making(tmp_path: Path) -> Callable[[Path], None]:
    """Writes a file, and a line for each time that it did."""

    def make(folder: Path) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{os.getpid()}\n")
        (folder / "file").write_text("content")

    return make


def test_one_of_many_makes_it(making: Callable[[Path], None], tmp_path: Path) -> None:
    # The lock is of an open file, so that threads exclude each other as processes do.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: MadeOnce(tmp_path)("a", making), range(8)))
    assert set(found) == {tmp_path / "a"}
    assert (found[0] / "file").read_text() == "content"
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def test_a_folder_that_was_not_finished_is_made_again(
    making: Callable[[Path], None], tmp_path: Path
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        MadeOnce(tmp_path)("a", fail)
    folder = MadeOnce(tmp_path)("a", making)
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_changed_file_is_found(making: Callable[[Path], None], tmp_path: Path) -> None:
    made, other = MadeOnce(tmp_path), MadeOnce(tmp_path)
    folder = made("a", making)
    # Such as the lock of a command that reads it.
    (folder / "another").touch()
    assert made.changed() == []
    (folder / "file").write_text("changed")
    assert made.changed() == ["a/file"]
    (folder / "file").unlink()
    assert made.changed() == ["a/file"]
    # It has not used the folder.
    assert other.changed() == []


def test_the_processes_of_a_run_look_in_one_place(tmp_path: Path) -> None:
    def root(own: Path, **config: object) -> Path:
        factory = SimpleNamespace(getbasetemp=lambda: own)
        return shared_root(factory, SimpleNamespace(**config))  # type: ignore[arg-type]

    workers = [root(tmp_path / name, workerinput={}) for name in ("popen-gw0", "popen-gw1")]
    assert workers == [tmp_path / "shared"] * 2
    # Alone, a run must not find what an earlier one left beside it.
    assert root(tmp_path / "pytest-7") == tmp_path / "pytest-7" / "shared"
