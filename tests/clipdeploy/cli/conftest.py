"""A workspace and digits that may be changed; verifications compute each image once."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from judging import each_once

from clipdeploy.cli.settings import SETTINGS
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


@pytest.fixture(scope="module", autouse=True)
def _each_once() -> Iterator[None]:
    with each_once():
        yield


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    """A workspace that may be changed, with the FP32 graph alone."""
    folder = tmp_path / "artifacts" / cards.DEMO
    folder.mkdir(parents=True)
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), folder)
    return tmp_path / "artifacts"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The first ten test digits of each class, in class folders."""
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        for digit in range(10):
            names = sorted(n for n in archive.namelist() if n.startswith(f"{digit}/"))[:10]
            archive.extractall(tmp_path / "digits", names)
    return tmp_path / "digits"


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, without settings."""
    for setting in SETTINGS:
        for variable in (setting.variable, setting.old_variable):
            if variable:
                monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("CLIPDEPLOY_CONFIG")
    monkeypatch.chdir(tmp_path)
    return tmp_path
