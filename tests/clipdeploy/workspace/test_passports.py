"""What a passport is compared with, and valid passports that differ from the card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from passport_edits import (
    DIGITS,
    EVERY,
    GRAPHS,
    changed,
    edits,
    file,
    leaves,
    put,
    restamp,
    text_of,
    write_text,
)
from safetensors.torch import load_file, save_file
from verify_command import run

from clipdeploy.core.errors import ArtifactError, ClipdeployError
from clipdeploy.core.passport import Recipe
from clipdeploy.engines.passport import passport_path
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    QuantizeConfig,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
)
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.passports import checked_passport
from exporters.onnx import ExportConfig
from exporters.precision import Fp16Config


def refusal(path: Path) -> str:
    """Why a passport is refused; empty if it is accepted."""
    try:
        checked_passport(path)
    except ClipdeployError as error:
        return error.message
    return ""


# The path and layout of a checkpoint do not matter. Nothing can be compared with how and by
# what an artifact was made, nor with its parents if they are in another folder, nor with a probe.
FREE = (
    *("weights.path", "weights.layout", "weights.probed"),
    *("settings", "versions", "schema", "parents.calibration"),
)


@pytest.mark.parametrize("kind", EVERY)
def test_any_field_that_decides_anything(kind: str, engine_artifacts: Path) -> None:
    path = file(engine_artifacts, kind)
    sound = text_of(path)
    # An engine's passport has a copy of its graph's: no field of it may change.
    # verify detects other weights of the FP32 graph, since it loads them.
    free = (*FREE, "weights.sha256", "weights.resized") if kind.startswith("fp32") else FREE
    taken = []
    engine = path.suffix == ".engine"
    raw = json.loads(sound)
    for where in leaves(raw["graph"] if engine else raw):
        name = ".".join(map(str, where))
        if not engine and name.startswith(free):
            continue
        edited = json.loads(sound)
        inner = edited["graph"] if engine else edited
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = changed(inner[where[-1]])
        write_text(path, json.dumps(edited))
        if path.name not in refusal(path):
            taken.append(name)
    assert taken == []
    write_text(path, sound)
    assert checked_passport(path).graph.model == cards.DEMO


# --- precision


@pytest.mark.parametrize(
    ("kind", "said"),
    [(kind, said) for kind in GRAPHS for said in ("fp32", "fp16", "int8", "int8-cpu")],
)
def test_a_precision_is_what_the_graph_holds(kind: str, said: str, engine_artifacts: Path) -> None:
    path = file(engine_artifacts, kind)
    found = kind.removesuffix(".onnx")
    if said == found:
        assert checked_passport(path).graph.precision == said
        return
    restamp(path, put("precision", said))
    said_so = f"does not match the graph itself: precision is {said}, not {found}"
    with pytest.raises(ArtifactError, match=said_so):
        checked_passport(path)


# --- what stays allowed


def test_sound_artifacts_are_taken(engine_artifacts: Path, three: Path) -> None:
    for kind in EVERY:
        path = file(engine_artifacts, kind)
        assert checked_passport(path).graph.model == cards.DEMO
        moved = engine_artifacts.parent / f"moved.{kind}"
        shutil.copy(path, moved)
        if path.suffix == ".engine":
            shutil.copy(passport_path(path), passport_path(moved))
        assert checked_passport(moved).graph == checked_passport(path).graph
    found = run("predict", three, "--artifact", file(engine_artifacts, "int8.onnx"), "--json")
    assert json.loads(found.stdout)["images"][0]["guesses"][0]["name"] == "3"


def test_other_recipes_inputs_and_weights_are_their_own(tmp_path: Path, three: Path) -> None:
    """Every option of an export changes the passport, and the passport stays true."""
    shipped, timm = Workspace(tmp_path / "shipped"), Recipe("as-shipped", "timm")
    made = export_model(shipped, cards.DEMO, recipe=timm, config=ExportConfig(preprocess=True))
    assert shipped.source(cards.DEMO)[1] == made.passport
    half = convert_model(shipped, cards.DEMO, Fp16Config(half_io=True)).path
    passport = checked_passport(half, made.passport).graph
    assert (passport.input.dtype, passport.output.dtype) == ("uint8", "float16")
    # The graph's mean and std, compared with those of another recipe.
    trained = cards.find(cards.DEMO).preprocess(Recipe())
    restamp(half, edits(put("recipe.numerics", "trained"), put("preprocess.mean", trained.mean)))
    restamp(half, put("preprocess.std", trained.std))
    with pytest.raises(ArtifactError, match=r"does not match .*: recipe\.numerics is"):
        checked_passport(half)
    random = Workspace(tmp_path / "random")
    config = ExportConfig(batch=4)
    made = export_model(random, cards.DEMO, WeightsChoice(random_seed=1), config=config)
    assert random.source(cards.DEMO)[1].weights.kind == "random"
    assert run("predict", three, "--artifact", made.path).exit_code == 0


def test_the_normalisation_inside_a_graph_is_its_passports(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    path = export_model(workspace, cards.DEMO, config=ExportConfig(preprocess=True)).path
    assert workspace.source(cards.DEMO)
    model = onnx.load(path)
    (offset,) = (each for each in model.graph.initializer if each.name == "preprocess/offset")
    values = onnx.numpy_helper.to_array(offset) * 1.1
    offset.CopyFrom(onnx.numpy_helper.from_array(values, offset.name))
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match=r"preprocess\.mean or preprocess\.std is not what"):
        workspace.source(cards.DEMO)


@pytest.fixture
def fine_tuned(tmp_path: Path) -> Callable[[int], Workspace]:
    """A user's checkpoint with this many classes, exported."""

    def make(classes: int) -> Workspace:
        tensors = load_file(cards.demo_file("weights.safetensors"))
        for name in ("head.weight", "head.bias"):
            tensors[name] = tensors[name][:classes].contiguous() * 0.9
        checkpoint = tmp_path / f"{classes}.safetensors"
        save_file(tensors, checkpoint)
        workspace = Workspace(tmp_path / f"of-{classes}")
        export_model(workspace, cards.DEMO, WeightsChoice(checkpoint))
        return workspace

    return make


def test_a_fine_tune_has_a_head_and_names_of_its_own(
    fine_tuned: Callable[[int], Workspace], three: Path
) -> None:
    workspace = fine_tuned(4)
    path, passport = workspace.source(cards.DEMO)
    assert (passport.classes, passport.class_names) == (4, ())
    half = convert_model(workspace, cards.DEMO).path
    found = run("predict", three, "--artifact", half, "--json")
    assert json.loads(found.stdout)["images"][0]["guesses"][0]["name"] == "3"
    # Names that its FP32 graph does not have are refused.
    restamp(half, put("class_names", ["ant", "bee", "cat", "dog"]))
    result = run("predict", three, "--artifact", half)
    assert result.exit_code == 1
    assert "does not match fp32.onnx in the same folder: class_names" in result.stderr
    restamp(path, put("class_names", ["ant", "bee", "cat", "dog"]))
    assert workspace.source(cards.DEMO)[1].class_names[3] == "dog"
    restamp(path, put("class_names", ["ant", "bee", "cat"]))
    with pytest.raises(ArtifactError, match="3 different class_names for 4 classes"):
        workspace.source(cards.DEMO)


def test_a_fine_tune_of_as_many_classes(fine_tuned: Callable[[int], Workspace]) -> None:
    """A checkpoint may have other names; the card's in another order are a mistake."""
    workspace = fine_tuned(10)
    path, passport = workspace.source(cards.DEMO)
    assert passport.class_names == tuple(DIGITS)
    restamp(path, put("class_names", list("abcdefghij")))
    assert workspace.source(cards.DEMO)[1].class_names[0] == "a"
    for names in (DIGITS[::-1], [*"abcdefghi", "0"]):
        restamp(path, put("class_names", names))
        with pytest.raises(ArtifactError, match=r"class_names\[0\]"):
            workspace.source(cards.DEMO)


def test_int8_for_cpus_and_int8_without_a_linear(demo_workspace: Workspace, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    shutil.copytree(demo_workspace.root, workspace.root)
    _, reference = workspace.source(cards.DEMO)
    calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
    for config in (
        QuantizeConfig(remainder="fp32"),
        QuantizeConfig(exclude=("*",)),
        QuantizeConfig(exclude=("*",), remainder="fp32"),
    ):
        made = quantize_model(workspace, cards.DEMO, config).artifact
        assert checked_passport(made.path, reference).graph == made.passport
        assert ("*" in config.exclude) == (made.passport.settings["int8_nodes"] == 0)
    restamp(made.path, put("settings.int8_nodes", 24))
    with pytest.raises(ArtifactError, match="precision is"):
        checked_passport(made.path, reference)
