"""Which files may be judged, and which are refused before anything runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from clipdeploy.core.errors import ArtifactError, FileError, GraphError, UsageError
from clipdeploy.core.passport import PASSPORT_KEY, Passport, Recipe, WeightsOrigin, to_json
from clipdeploy.models import cards
from clipdeploy.verification.targets import (
    Target,
    named_targets,
    open_target,
    workspace_targets,
)
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport


@pytest.fixture
def source(demo_workspace: Workspace) -> Path:
    return demo_workspace.graph(cards.DEMO, "fp32")


@pytest.fixture
def reference(source: Path) -> Passport:
    return read_passport(source)


def stamped(source: Path, path: Path, passport: Passport | None) -> Path:
    """A copy of a graph with another passport, or none."""
    model = onnx.load(source)
    del model.metadata_props[:]
    if passport is not None:
        onnx.helper.set_model_props(model, {PASSPORT_KEY: to_json(passport).decode()})
    onnx.save(model, path)
    return path


def test_a_named_graph(source: Path, reference: Passport) -> None:
    (found,) = named_targets([source], reference, trust=False)
    assert found == Target(source, "graph", reference)
    runner, entry = open_target(found)
    assert runner is not None
    assert (entry.precision, entry.vouched, entry.emulated) == ("fp32", True, False)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_without_a_passport_the_graph_speaks_for_itself(
    precision: Any, demo_workspace: Workspace, reference: Passport, tmp_path: Path
) -> None:
    path = stamped(demo_workspace.graph(cards.DEMO, precision), tmp_path / "g.onnx", None)
    (found,) = named_targets([path], reference, trust=False)
    assert not found.vouched
    assert found.precision == precision
    assert found.passport.input == reference.input
    assert found.passport.preprocess == reference.preprocess
    runner, entry = open_target(found)
    assert runner is not None
    assert not entry.vouched
    assert not entry.emulated
    assert ("float16 as stored" in entry.runner) == (precision != "fp32")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": "clip-vit-base-p16"}, "model"),
        ({"weights": WeightsOrigin("file", "x", "0" * 64)}, "weights"),
        ({"weights": WeightsOrigin("random", seed=1)}, "weights"),
        ({"class_names": tuple("0124356789")}, r"class_names\[3\]"),
        ({"class_names": ()}, "class_names"),
        ({"classes": 9}, "classes"),
        ({"recipe": Recipe("as-shipped")}, r"recipe\.numerics"),
        ({"recipe": Recipe(resize="timm")}, r"recipe\.resize"),
        ({"kind": "calibration"}, "kind"),
        ({"precision": "fp16"}, "precision"),
    ],
)
def test_a_graph_of_something_else(
    changes: dict[str, Any], what: str, source: Path, reference: Passport, tmp_path: Path
) -> None:
    path = stamped(source, tmp_path / "g.onnx", replace(reference, **changes))
    with pytest.raises(ArtifactError, match=f"does not match [^:]*: {what} is"):
        named_targets([path], reference, trust=False)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"mean": (0.5, 0.4578275, 0.40821073)}, r"mean\[0\].* is 0\.5, not 0\.48145466"),
        ({"std": (0.26862954, 0.26130258, 1.0)}, r"std\[2\].* is 1\.0, not 0\.27577711"),
        ({"size": 36}, "size.* is 36, not 32"),
        ({"crop_pct": 0.9}, r"crop_pct.* is 0\.9, not 1\.0"),
        ({"crop_mode": "squash"}, "crop_mode.* is squash, not center"),
        ({"exif_orientation": False}, "exif_orientation.* is False, not True"),
    ],
)
def test_other_preprocessing(
    changes: dict[str, Any], what: str, source: Path, reference: Passport, tmp_path: Path
) -> None:
    spec = replace(reference.preprocess, **changes)
    path = stamped(source, tmp_path / "p.onnx", replace(reference, preprocess=spec))
    with pytest.raises(ArtifactError, match=rf"does not match [^:]*: preprocess\.{what}"):
        named_targets([path], reference, trust=False)


def test_weights_that_were_moved_are_the_same_weights(
    source: Path, reference: Passport, tmp_path: Path
) -> None:
    moved = replace(reference, weights=replace(reference.weights, path="/elsewhere"))
    path = stamped(source, tmp_path / "g.onnx", moved)
    assert named_targets([path], reference, trust=False)


def test_what_is_no_artifact(source: Path, reference: Passport, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither \.onnx nor \.engine"):
        named_targets([tmp_path / "weights.pth"], reference, trust=False)
    with pytest.raises(UsageError, match="named twice"):
        named_targets([source, source], reference, trust=False)
    with pytest.raises(UsageError, match="named twice"):
        named_targets(
            [source, source.parent / ".." / source.parent.name / source.name],
            reference,
            trust=False,
        )
    with pytest.raises(FileError):
        named_targets([tmp_path / "gone.onnx"], reference, trust=False)
    for data in (b"", b"noise" * 100, source.read_bytes()[:-1000]):
        (tmp_path / "bad.onnx").write_bytes(data)
        with pytest.raises(GraphError):
            named_targets([tmp_path / "bad.onnx"], reference, trust=False)
    (tmp_path / "bad.engine").write_bytes(b"plan")
    with pytest.raises(ArtifactError):
        named_targets([tmp_path / "bad.engine"], reference, trust=False)


def test_a_damaged_passport_is_not_taken_for_none(
    source: Path, reference: Passport, tmp_path: Path
) -> None:
    """Otherwise damaging the passport of another model would hide it."""
    path = stamped(source, tmp_path / "g.onnx", None)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {PASSPORT_KEY: "{"})
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="passport"):
        named_targets([path], reference, trust=False)


def test_a_graph_of_other_classes(source: Path, reference: Passport, tmp_path: Path) -> None:
    path = stamped(source, tmp_path / "g.onnx", None)
    with pytest.raises(GraphError, match="not logits of 1000 classes"):
        named_targets([path], replace(reference, classes=1000), trust=False)


def test_an_engine_that_cannot_run_says_why(
    demo_workspace: Workspace, reference: Passport, tmp_path: Path
) -> None:
    path = tmp_path / "x.engine"
    path.write_bytes(b"no plan at all")
    (found,) = named_targets([path], reference, trust=True)
    assert not found.vouched
    runner, entry = open_target(found, trust=True)
    assert runner is None
    assert entry.runner == ""
    assert entry.why_not


def test_stale_graphs_of_a_workspace_are_refused(demo_workspace: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    shutil.copytree(demo_workspace.folder(cards.DEMO), workspace.folder(cards.DEMO))
    found = workspace_targets(workspace, cards.DEMO, graphs_only=True)
    assert [target.precision for target in found] == ["fp32", "fp16", "int8"]
    path = workspace.graph(cards.DEMO, "fp32")
    path.write_bytes(path.read_bytes() + b"\x08\x0a")
    with pytest.raises(ArtifactError, match="was not made from"):
        workspace_targets(workspace, cards.DEMO, graphs_only=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weights_in_another_file_belong_to_the_graph(
    precision: Any, demo_workspace: Workspace, reference: Passport, tmp_path: Path
) -> None:
    """torch.onnx writes them there: if the hash ignored them, records would be reused wrongly."""
    path = stamped(demo_workspace.graph(cards.DEMO, precision), tmp_path / "g.onnx", None)
    inside, entry = open_target(named_targets([path], reference, trust=False)[0])
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="g.data")
    outside, before = open_target(named_targets([path], reference, trust=False)[0])
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    assert inside is not None
    assert outside is not None
    assert not before.emulated
    np.testing.assert_array_equal(outside(images), inside(images))
    data = (tmp_path / "g.data").read_bytes()
    (tmp_path / "g.data").write_bytes(data[:5000] + bytes(100) + data[5100:])
    _, after = open_target(named_targets([path], reference, trust=False)[0])
    assert after.sha256 != before.sha256 != entry.sha256
    (tmp_path / "g.data").unlink()
    with pytest.raises(FileError, match=r"g\.data"):
        open_target(named_targets([path], reference, trust=False)[0])
