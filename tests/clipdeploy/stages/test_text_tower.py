"""CLIP's text tower as graphs and engines, against PyTorch and transformers.

Covers: clipdeploy/stages/samples.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from clip_files import oracles, write_clip
from demo_workspaces import CLIP, EMBEDDER
from graph_edits import read, write
from onnx import ModelProto
from passport_edits import restamp
from safetensors.torch import load_file, save_file
from script_module import load_script
from shared_traces import shared_traces

from clipdeploy.core.errors import ArtifactError, ClipdeployError, GraphError, UsageError
from clipdeploy.core.passport import Passport, Precision, Recipe, TensorSpec, WeightsOrigin
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.models import cards
from clipdeploy.models.clip.text import TextGeometry, TextTower
from clipdeploy.models.clip.tokenizer import END, tokenize, vocabulary_hash
from clipdeploy.models.load import WeightsChoice, load_model, reload_text
from clipdeploy.models.vit import BlockConfig
from clipdeploy.stages.build import build_model
from clipdeploy.stages.quantize import convert_model
from clipdeploy.stages.samples import sample_texts
from clipdeploy.stages.text_tower import export_towers
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.inspection import inspect_file
from clipdeploy.workspace.passports import checked_passport
from exporters.checks import check_parity
from exporters.graphs import load_graph
from exporters.metrics import sqnr_db
from exporters.onnx import export_graph
from exporters.overflow import stored_logits
from exporters.precision import half_precision
from exporters.session import OnnxSession

# Of the largest value; float32 and another order of sums.
TOLERANCE = 1e-4
IDS = sample_texts().ids


def reference(towers: Workspace) -> dict[int, np.ndarray]:
    passport = towers.source(EMBEDDER)[1]
    with torch.inference_mode():
        found = reload_text(passport.weights, "normalised").module(torch.from_numpy(IDS)).numpy()
    return {1: found[:1], 3: found}


def test_the_graph_has_few_nodes_and_pytorchs_embeddings(towers: Workspace) -> None:
    path, passport = towers.source(EMBEDDER, "text")
    operators = [node.op_type for node in load_graph(path).graph]
    assert operators[:3] == ["Gather", "Add", "LayerNormalization"]
    ends = ["ArgMax", "GatherND", "LayerNormalization", "Gemm", "ReduceL2", "Div"]
    assert operators[-6:] == ends
    # Each block has one Add more than in the image tower, for the mask.
    assert len(operators) == 2 + 2 * 23 + 6
    assert (passport.tower, passport.task, passport.classes) == ("text", "embedding", 32)
    assert (passport.input.dtype, passport.input.shape) == ("int32", ("batch", 77))
    assert passport.settings["tokenizer_sha256"] == vocabulary_hash()
    assert passport.settings["logit_scale"] == pytest.approx(10.0075, abs=1e-4)
    # A short text, a usual one, and one that is cut.
    assert [int(row.argmax()) for row in IDS] == [2, 15, 76]
    assert check_parity(path, IDS, reference(towers)) < 1e-6
    assert inspect_file(path).passport == passport


def test_texts_that_are_padded_with_ends_are_the_same(towers: Workspace) -> None:
    """As transformers pads them: the first end counts."""
    session = OnnxSession(towers.graph(EMBEDDER, "fp32", "text"))
    behind = np.arange(77) > IDS.argmax(axis=1)[:, None]
    padded = np.where(behind, END, IDS).astype(np.int32)
    assert (padded != IDS).any()
    np.testing.assert_allclose(session.run(padded)[0], session.run(IDS)[0], atol=1e-6)


def random_text_tower(block: BlockConfig, depth: int, embed: int) -> TextTower:
    """A text tower whose Linears keep the scale of their inputs, as trained ones."""
    generator = torch.Generator().manual_seed(0)
    tower = TextTower(TextGeometry(block, depth, embed), "normalised").requires_grad_(False)
    for name, value in tower.named_parameters():
        if name.endswith("weight") and value.ndim == 2:
            value.normal_(std=value.shape[1] ** -0.5, generator=generator)
        elif name in ("token_embed", "position"):
            value.normal_(std=0.3, generator=generator)
    return tower.eval()


def random_passport(model: str, classes: int) -> Passport:
    card = cards.find(model)
    return Passport(
        kind="graph",
        model=card.name,
        precision="fp32",
        weights=WeightsOrigin("random", seed=0),
        recipe=Recipe(),
        preprocess=card.preprocess(Recipe()),
        input=TensorSpec("ids", "int32", ("batch", 77)),
        output=TensorSpec("embedding", "float32", ("batch", classes)),
        classes=classes,
        task="embedding",
        tower="text",
    )


def without_mask(model: ModelProto) -> None:
    write(model, "mask", np.zeros((77, 77)))


def ends_at_the_start(model: ModelProto) -> None:
    end = next(node for node in model.graph.node if node.op_type == "ArgMax")
    end.op_type = "ArgMin"


@pytest.mark.parametrize("fault", [without_mask, ends_at_the_start])
def test_a_wrong_graph_is_not_pytorchs(
    fault: Callable[[ModelProto], None], towers: Workspace, tmp_path: Path
) -> None:
    model = onnx.load(towers.graph(EMBEDDER, "fp32", "text"))
    fault(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(GraphError, match="differ from PyTorch's"):
        check_parity(tmp_path / "wrong.onnx", IDS, reference(towers))


def test_the_fp16_graph_keeps_the_embeddings(towers: Workspace) -> None:
    path = towers.graph(EMBEDDER, "fp16", "text")
    passport = checked_passport(path, tower="text").graph
    # The mask is far from float16's largest number, with the scores added.
    assert passport.settings["keep_fp32"] == []
    assert read(onnx.load(path), "mask").dtype == np.float16
    db = sqnr_db(reference(towers)[3], stored_logits(path, IDS))
    assert db is not None
    assert db > 50


def test_clips_own_mask_is_not_finite_in_float16(towers: Workspace, tmp_path: Path) -> None:
    model = onnx.load(towers.graph(EMBEDDER, "fp32", "text"))
    write(model, "mask", np.triu(np.full((77, 77), -np.inf), 1))
    onnx.save(model, tmp_path / "infinite.onnx")
    with pytest.raises(GraphError, match="the weight mask reaches inf"):
        half_precision(load_graph(tmp_path / "infinite.onnx"))


def test_the_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "artifacts")
    choice = WeightsChoice(write_clip("transformers", tmp_path / "clip"), embedding="raw")
    with shared_traces():
        made = export_towers(workspace, None, choice)
    script = load_script("write_clip_oracles")
    ids = tokenize([each.format(script.CLASSES[1]) for each in script.TEMPLATES]).ids
    found = OnnxSession(made.text.path).run(ids.astype(np.int32))[0]
    expected = oracles()["transformers-texts"]
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_recorded_choice_reads_the_texts_as_the_file_says(tmp_path: Path) -> None:
    """The passport has the images' GELU; the texts may have another one."""
    folder = write_clip("transformers", tmp_path / "clip")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace("quick_gelu", "gelu", 1))
    assert config.read_text().index('"gelu"') < config.read_text().index('"quick_gelu"')
    choice = WeightsChoice(folder, embedding="raw")
    name = "vit-p8-32px-w128-d2-h2-m256-e48-raw"
    model = load_model(cards.find(name), choice, Recipe())
    assert model.weights.choices.gelu == "erf"
    assert reload_text(model.weights, "raw").module.geometry.block.gelu == "quick"


def test_nothing_is_done_twice(towers: Workspace) -> None:
    again = export_towers(towers, EMBEDDER)
    assert not again.image.changed
    assert not again.text.changed
    assert not convert_model(towers, EMBEDDER, tower="text").changed


FAULTS: dict[str, tuple[Callable[[Workspace], object], str]] = {
    "the text tower as an image tower": (
        lambda w: checked_passport(w.graph(EMBEDDER, "fp16", "text")),
        "is a text tower, which takes token ids, not images",
    ),
    "the image tower as a text tower": (
        lambda w: checked_passport(w.graph(EMBEDDER, "fp32"), tower="text"),
        "is no text tower: it takes images",
    ),
    "under the image tower's name": (
        lambda w: (
            shutil.copy(w.graph(EMBEDDER, "fp32", "text"), w.graph(EMBEDDER, "fp32")),
            w.source(EMBEDDER),
        ),
        "is a text tower",
    ),
    "another logit scale": (
        lambda w: (
            restamp(
                w.graph(EMBEDDER, "fp16", "text"), lambda p: p["settings"].update(logit_scale=1)
            ),
            checked_passport(w.graph(EMBEDDER, "fp16", "text"), tower="text"),
        ),
        r"settings\.logit_scale is 1, not 10\.0",
    ),
    "in INT8": (
        lambda w: build_model(w, EMBEDDER, "int8", tower="text"),
        "the text tower has no int8 engine",
    ),
    "of a classifier": (
        lambda w: export_towers(w, cards.DEMO),
        "clip-vit-demo gives logits, and has no text tower",
    ),
    "of random weights": (
        lambda w: export_towers(w, EMBEDDER, WeightsChoice(random_seed=0)),
        "random weights have no text tower",
    ),
    "not exported": (
        lambda w: Workspace(w.root / "other").source(EMBEDDER, "text"),
        "the text tower of .* has not been exported",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, copied_towers: Workspace) -> None:
    act, message = FAULTS[fault]
    with pytest.raises(ClipdeployError, match=message):
        act(copied_towers)


def test_a_text_tower_of_another_clip_is_refused(copied_towers: Workspace, tmp_path: Path) -> None:
    other, clip = Workspace(tmp_path / "other"), tmp_path / "clip"
    shutil.copytree(CLIP, clip)
    tensors = load_file(clip / "model.safetensors")
    tensors["text_projection.weight"] = 2 * tensors["text_projection.weight"]
    save_file(tensors, clip / "model.safetensors")
    with shared_traces():
        export_towers(other, None, WeightsChoice(clip, embedding="normalised"))
    shutil.copy(
        other.graph(EMBEDDER, "fp32", "text"), copied_towers.graph(EMBEDDER, "fp32", "text")
    )
    with pytest.raises(ArtifactError, match=r"does not match fp32\.onnx .*: weights is"):
        copied_towers.source(EMBEDDER, "text")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_tensorrt_rtx_builds_the_text_tower(precision: Precision, copied_towers: Workspace) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    config = BuildConfig(backend="tensorrt-rtx")
    made = build_model(copied_towers, EMBEDDER, precision, config, tower="text")
    assert made.path == copied_towers.folder(EMBEDDER) / f"text-{precision}.engine"
    assert checked_passport(made.path, tower="text").engine == made.passport
    asked = {kind for block in made.passport.asked for kind in (*block.gemms, *block.attention)}
    assert asked == {precision}
    assert not made.passport.fallbacks
    assert not build_model(copied_towers, EMBEDDER, precision, config, tower="text").changed


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_text_tower_of_b16(tmp_path: Path) -> None:
    """Of random weights: width 512, 8 heads, 3 of the 12 equal blocks."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    tower = random_text_tower(BlockConfig(512, 8, 2048, 1e-5, "quick"), depth=3, embed=512)
    model = "vit-p16-224px-w768-d12-h12-e512-normalised"
    workspace = Workspace(tmp_path / "artifacts")
    export_graph(
        tower,
        workspace.graph(model, "fp32", "text"),
        random_passport(model, classes=512),
        sample_texts(),
        release=True,
    )
    made = build_model(workspace, model, "fp16", BuildConfig(backend="tensorrt-rtx"), tower="text")
    assert len(made.passport.asked) == 4
    assert not made.passport.fallbacks


def test_a_classifier_has_no_text_tower(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gives logits, and has no text tower") as caught:
        Workspace(tmp_path).source(cards.DEMO, "text")
    assert "--embeddings --text-tower" in caught.value.hint
