"""What many tests share: the demo model, its images, and a workspace with every stage done."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_server import CommandProgram, CommandServer, command_server
from demo_workspaces import complete_workspace, graph_workspace
from made_once import MadeOnce, shared_root
from numpy.typing import NDArray

from clipdeploy.cli.settings import SETTINGS
from clipdeploy.core.device import gpus
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice, load_model
from clipdeploy.workspace.folder import Workspace
from exporters.samples import normalise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: else the last of them would run alone, on one core."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if not gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """The tests and their imports stay, so that no garbage collection need look at them again.

    Collections are rarer too: with the default thresholds they take a twentieth of all time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches a server by mistake, none has the user's settings or touches the cache."""
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)
    # Set in the processes of pytest-xdist: it would limit the lines of what commands print.
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("CLIPDEPLOY_CONFIG", os.devnull)
    monkeypatch.setenv("CLIPDEPLOY_OFFLINE", "1")
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path / "home"))


@pytest.fixture
def python_hears_ctrl_c() -> Iterator[None]:
    """As in a terminal: what starts in the background may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def made_once(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[MadeOnce]:
    """Makes folders that all processes of pytest-xdist read; that none writes to is checked."""
    once = MadeOnce(shared_root(tmp_path_factory, pytestconfig))
    yield once
    assert once.changed() == [], "a test has changed what all tests read"


@pytest.fixture(scope="session")
def demo_workspace(made_once: MadeOnce) -> Workspace:
    """The demo card exported, calibrated, converted to FP16 and quantised.  Read only."""
    folder = made_once("demo", lambda folder: graph_workspace(folder / "artifacts"))
    return Workspace(folder / "artifacts")


@pytest.fixture(scope="session")
def complete_demo(demo_workspace: Workspace, made_once: MadeOnce) -> Workspace:
    """The demo workspace with shards to merge and, where it can be built, an engine.  Read only."""
    folder = made_once(
        "complete", lambda folder: complete_workspace(demo_workspace, folder / "artifacts")
    )
    return Workspace(folder / "artifacts")


@pytest.fixture(scope="session")
def commands() -> Iterator[CommandServer]:
    """Runs ``clipdeploy`` in processes of its own, without the time of its imports."""
    with command_server() as started:
        yield started


@pytest.fixture(scope="session")
def program(commands: CommandServer) -> CommandProgram:
    """The same for shells, pipes and subprocesses."""
    return commands.program


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    """The demo card's reference model."""
    return load_model(cards.find(cards.DEMO), WeightsChoice(), Recipe())


@pytest.fixture(scope="session")
def demo_images(demo_model: LoadedModel) -> NDArray[np.float32]:
    """Sixteen held-out digits, normalised, float32 (16, 3, 32, 32)."""
    spec = demo_model.card.preprocess(demo_model.recipe)
    digits = select(open_images(cards.demo_file("test.zip")), 16, seed=0)
    return normalise(np.stack([crop.pixels for crop in iter_crops(digits, spec)]), spec)
