"""A finished deployment, to look at and to change; verifications compute each image once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from deployments import CONFIG
from judging import each_once

from clipdeploy.models import cards
from clipdeploy.pipeline import Deployment, Workspace, deploy_model


@pytest.fixture(scope="module", autouse=True)
def _each_once() -> Iterator[None]:
    with each_once():
        yield


@pytest.fixture(scope="session")
def tensorrt_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")


@pytest.fixture(scope="session")
def deployed(
    tensorrt_rtx: None, demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, Deployment]:
    """A deployment whose graphs were there already.  Read only."""
    workspace = Workspace(tmp_path_factory.mktemp("deployed") / "artifacts")
    shutil.copytree(demo_workspace.root, workspace.root)
    with each_once():
        return workspace, deploy_model(workspace, cards.DEMO, CONFIG)


@pytest.fixture
def workspace(deployed: tuple[Workspace, Deployment]) -> Iterator[Workspace]:
    """The deployment's own folder, put back after the test: results name their paths."""
    original, _ = deployed
    saved = original.root.with_name("saved")
    shutil.copytree(original.root, saved)
    yield original
    shutil.rmtree(original.root)
    saved.rename(original.root)
