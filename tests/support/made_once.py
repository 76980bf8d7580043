"""Folders that the processes of pytest-xdist share: the first to need one makes it.

Each process has a temporary folder of its own, beside those of the others.  Shared ones are beside
them all, and are removed with them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clipdeploy.core.leftovers import HeldError, try_lock

__all__ = ["MadeOnce", "shared_root"]


def shared_root(tmp: pytest.TempPathFactory, config: pytest.Config) -> Path:
    """Where all processes of this run look: without pytest-xdist this process alone."""
    own = tmp.getbasetemp()
    # Not PYTEST_XDIST_WORKER: a test that runs pytest itself would hand it down.
    return (own.parent if hasattr(config, "workerinput") else own) / "shared"


class MadeOnce:
    """Makes folders under ``root``, each in one process.  All of them are read only."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._used: list[str] = []

    def __call__(self, name: str, make: Callable[[Path], object]) -> Path:
        """Return the folder ``name``, which ``make`` fills unless another process has."""
        folder = self._root / name
        with self._alone(name):
            if not self._record(name).exists():
                # Of a process that failed in the middle.
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                self._record(name).write_text(json.dumps(_files(folder)))
        self._used.append(name)
        return folder

    def changed(self) -> list[str]:
        """Return the files of the folders used here that somebody changed or removed since."""
        found = []
        for name in self._used:
            made, now = json.loads(self._record(name).read_text()), _files(self._root / name)
            found += [f"{name}/{file}" for file in made if now.get(file) != made[file]]
        return found

    def _record(self, name: str) -> Path:
        return self._root / f"{name}.made.json"

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        path = self._root / f"{name}.lock"
        path.touch()
        descriptor = _locked(path)
        try:
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _locked(path: Path) -> int | None:
    """Wait for the lock; None where there are none, as on Windows."""
    while True:
        try:
            return try_lock(path)
        except HeldError:
            time.sleep(0.05)


def _files(folder: Path) -> dict[str, list[int]]:
    """The size and the time of the last change of each file."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    states = ((str(path.relative_to(folder)), path.stat()) for path in paths)
    return {name: [state.st_size, state.st_mtime_ns] for name, state in states}
