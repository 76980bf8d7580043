"""Shared traces, and the demo's workspace with an INT8 engine for the tests of edited passports."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_workspaces import tower_workspace
from made_once import MadeOnce
from passport_edits import a_three, with_engine
from shared_traces import shared_traces

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import BuildError
from clipdeploy.engines.backends import Backend, compute_capabilities, is_installed, tensorrt_module
from clipdeploy.workspace.folder import Workspace

_BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")


@pytest.fixture(scope="module", autouse=True)
def _traces() -> Iterator[None]:
    """Share the demo's trace: most tests that export it want other weights or settings."""
    with shared_traces():
        yield


@pytest.fixture(scope="session")
def gpu_backend() -> Backend:
    """A TensorRT whose engines run on this machine's GPU: all tests of a process use the same."""
    here, found = gpus()[0].capability, [each for each in _BACKENDS if is_installed(each)]
    for backend in found:
        try:
            module = tensorrt_module(backend)
        # The process already uses the other one.
        except BuildError as error:
            pytest.skip(str(error))
        if backend == "tensorrt" or here in compute_capabilities(module):
            return backend
    pytest.skip(f"{' and '.join(found) or 'no TensorRT'}: no engine for SM {here}")


@pytest.fixture(scope="session")
def towers(made_once: MadeOnce) -> Workspace:
    """Both towers of the demo's CLIP, in FP32 and FP16.  Read only."""
    folder = made_once("towers", lambda folder: tower_workspace(folder / "artifacts"))
    return Workspace(folder / "artifacts")


@pytest.fixture
def copied_towers(towers: Workspace, tmp_path: Path) -> Workspace:
    """A copy of :func:`towers` that a test may change."""
    shutil.copytree(towers.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


@pytest.fixture(scope="session")
def engine_workspace(demo_workspace: Workspace, made_once: MadeOnce) -> Path:
    """The root of the demo's workspace with an INT8 engine.  Read only."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    folder = made_once(
        "with-engine", lambda folder: with_engine(demo_workspace, folder / "artifacts")
    )
    return folder / "artifacts"


@pytest.fixture
def engine_artifacts(engine_workspace: Path, tmp_path: Path) -> Path:
    """A copy of that workspace that a test may change."""
    shutil.copytree(engine_workspace, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A held-out image of a 3."""
    return a_three(tmp_path_factory.mktemp("three"))
