"""The files of a workspace, and workspaces that are damaged.

Covers: clipdeploy/workspace/names.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


def test_the_last_model_is_remembered(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    with pytest.raises(UsageError, match="no model in the workspace") as caught:
        workspace.last_model()
    assert "clipdeploy export --model" in caught.value.hint
    workspace.remember("a")
    workspace.remember("b")
    assert workspace.last_model() == "b"


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "workspace.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"workspace\.json"):
        Workspace(tmp_path).last_model()


@pytest.mark.parametrize("name", ["../../x", "/etc", "", "..", "a/b", "a\\b", "a\x1b[2J", "a\n"])
def test_the_last_model_is_a_name_and_no_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "workspace.json").write_text(json.dumps({"last_model": name}))
    with pytest.raises(ArtifactError, match=r"workspace\.json is invalid: last_model is"):
        Workspace(tmp_path).last_model()


def test_looking_makes_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    assert workspace.graph("m", "int8").name == "int8.onnx"
    assert workspace.engine("m", "fp16").name == "fp16.engine"
    assert workspace.calibration("m").parent == workspace.folder("m")
    assert not workspace.root.exists()


@pytest.mark.parametrize("kind", ["graph", "engine"])
def test_files_under_the_names_of_earlier_versions_are_found(kind: str, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    path: Callable[[str, str], Path] = getattr(workspace, kind)
    short = path("m", "fp16")
    long = short.with_name(f"m.{short.name}")
    long.parent.mkdir()
    long.write_bytes(b"old")
    assert path("m", "fp16") == long
    assert path("m", "int8").name == short.name.replace("fp16", "int8")
    short.write_bytes(b"new")
    assert path("m", "fp16") == short


def test_a_source_of_another_model_or_precision_is_refused(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    workspace, other = Workspace(tmp_path), cards.find("clip-vit-base-p16").name
    assert demo_workspace.source(cards.DEMO)[1].model == cards.DEMO
    for precision, model, what in (("fp32", other, "model"), ("fp16", cards.DEMO, "precision")):
        place = workspace.graph(model, "fp32")
        place.parent.mkdir()
        shutil.copy(demo_workspace.graph(cards.DEMO, precision), place)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=f"does not match [^:]*: {what} is") as caught:
            workspace.source(model)
        assert f"clipdeploy export --model {model} --force" in caught.value.hint
