"""The graph of a search's choice, with and without 8-bit sums of qkv and fc1.

Covers: clipdeploy/stages/search_products.py.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from demo_workspaces import few_digits
from rich.console import Console
from safetensors.torch import load_file, save_file

from calibration.recipe import load_recipe
from calibration.scheme import SchemeConfig
from clipdeploy.cli.main import main
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    SearchConfig,
    SearchResult,
    Workspace,
    calibrate_model,
    estimate_model,
    export_model,
    quantize_model,
    search_model,
)
from clipdeploy.stages import search, search_graphs
from clipdeploy.stages.search_graphs import score
from clipdeploy.tuning.pareto import Evaluation
from exporters.headers import graph_sha256, read_passport

CALIBRATION = cards.demo_file("calibration.zip")
# On an H100, qkv and attention of the demo are faster in INT8 at this batch, its MLP is not.
GPU, BATCH = "H100-SXM", 120
NAIVE = SchemeConfig("minmax", smooth=False)


def digits(workspace: Workspace) -> Path:
    """240 digits, beside the model's graphs: half to search on, and half to confirm on."""
    path = workspace.folder(cards.DEMO) / "digits.zip"
    return path if path.exists() else few_digits(path, 24)


def searched(workspace: Workspace, *, backend: Any = "tensorrt-rtx", **settings: Any) -> Any:
    place = {"gpu": GPU, "batch": BATCH, "format": "int8", "search_images": 120, "threads": 1}
    config = SearchConfig(**{**place, "max_drop": 10.0, "fixed_scheme": True, **settings})
    return search_model(workspace, cards.DEMO, digits(workspace), config, backend=backend)


def shown(found: SearchResult) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(found)
    return stream.getvalue()


def copied(workspace: Workspace, target: Path) -> Workspace:
    shutil.copytree(workspace.root, target)
    return Workspace(target)


@dataclass(frozen=True)
class Searched:
    workspace: Workspace
    result: SearchResult


@pytest.fixture(scope="module")
def rounded(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The search of the demo model.  Read only."""
    workspace = copied(demo_workspace, tmp_path_factory.mktemp("rounded") / "artifacts")
    return Searched(workspace, searched(workspace))


def test_sums_are_in_8_bits_where_that_is_cheaper_and_keeps_the_accuracy(rounded: Searched) -> None:
    found = rounded.result
    assert found.confirmed
    assert found.outputs
    assert found.chosen.outputs
    assert found.artifact.changed
    assert found.artifact.passport.settings["scope"]["outputs"] is True
    # The same products were evaluated without 8-bit sums before, and cost more.
    (plain,) = (
        point
        for point in found.points
        if point.quantised == found.chosen.quantised and not point.outputs
    )
    assert plain.cost - found.chosen.cost > 0.05
    said = shown(found)
    assert "in INT8 with 8-bit sums of qkv and fc1, " in said
    assert "11+5+out" in said
    assert "lose too much" not in said


def test_the_cost_is_the_estimate_of_the_written_graph(rounded: Searched) -> None:
    rows = estimate_model(rounded.workspace, cards.DEMO, GPU, (BATCH,)).rows
    (row,) = (each for each in rows if each.label == "int8.onnx")
    assert rounded.result.chosen.cost == pytest.approx(1 / row.speedup, rel=1e-9)


def test_the_recipe_writes_the_same_graph(rounded: Searched, tmp_path: Path) -> None:
    workspace = copied(rounded.workspace, tmp_path / "copy")
    graph = workspace.graph(cards.DEMO, "int8")
    searched_graph = graph_sha256(graph)
    recipe = load_recipe(rounded.result.recipe)
    assert recipe.config.scope.outputs
    config = recipe.config
    made = quantize_model(workspace, cards.DEMO, config, backend="tensorrt-rtx").artifact
    assert not made.changed
    words = ["quantize", "--workspace", str(workspace.root), "--model", cards.DEMO, "--json"]

    def changes(*options: str) -> bool:
        backend = {"CLIPDEPLOY_BACKEND": "tensorrt-rtx"}
        again = CliRunner().invoke(main, [*words, *options], env=backend)
        assert again.exit_code == 0, again.output
        return bool(json.loads(again.stdout)["artifact"]["changed"])

    # The graph of a search is kept.
    assert not changes()
    graph.unlink()
    assert changes("--recipe", str(rounded.result.recipe))
    assert graph_sha256(graph) == searched_graph


def test_they_can_be_refused(rounded: Searched, tmp_path: Path) -> None:
    workspace = copied(rounded.workspace, tmp_path / "copy")
    found = searched(workspace, outputs=False)
    assert not found.outputs
    assert not any(point.outputs for point in found.points)
    assert "outputs" not in read_passport(found.artifact.path).settings["scope"]
    assert found.chosen.quantised == rounded.result.chosen.quantised
    # Nothing had to be evaluated again.
    assert found.evaluations == rounded.result.evaluations
    words = ["--workspace", str(workspace.root), "--model", cards.DEMO]
    words += ["--data", str(digits(workspace))]
    words += ["--gpu", GPU, "--batch", str(BATCH), "--int8", "--search-images", "120"]
    words += ["--max-drop", "10", "--fixed-plan", "--threads", "1", "--json", "--quiet"]
    result = CliRunner().invoke(main, ["search", *words, "--no-quantize-outputs"])
    assert result.exit_code == 0, result.output
    read = json.loads(result.stdout)
    assert (read["outputs"], read["chosen"]["outputs"]) == (False, False)


def test_a_graph_for_a_cpu_and_a_cost_without_an_engine_have_none() -> None:
    assert SearchConfig().tries_outputs
    assert not SearchConfig(outputs=False).tries_outputs
    assert not SearchConfig(remainder="fp32").tries_outputs


def one_large_channel(target: Path) -> None:
    """Write the demo's weights with a channel of V that is a thousand times larger, and unused."""
    tensors = load_file(cards.demo_file("weights.safetensors"))
    width = cards.find(cards.DEMO).width
    for block in range(cards.find(cards.DEMO).depth):
        for kind in ("weight", "bias"):
            tensors[f"blocks.{block}.attn.qkv.{kind}"][2 * width] *= 1000
        tensors[f"blocks.{block}.attn.proj.weight"][:, 0] = 0
    save_file(tensors, target)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The search of the model of those weights.  Read only."""
    folder = tmp_path_factory.mktemp("large")
    workspace, weights = Workspace(folder / "artifacts"), folder / "large.safetensors"
    one_large_channel(weights)
    export_model(workspace, cards.DEMO, WeightsChoice(weights))
    calibrate_model(workspace, cards.DEMO, CALIBRATION)
    # In the form for TensorRT, the sums are rounded after the scale of each channel.
    return Searched(workspace, searched(workspace, backend="tensorrt", scheme=NAIVE))


def test_sums_that_lose_too_much_stay_in_fp16(large: Searched, tmp_path: Path) -> None:
    workspace, found = copied(large.workspace, tmp_path / "artifacts"), large.result
    assert found.confirmed
    assert any(name.endswith("attn.qkv") for name in found.chosen.quantised)
    assert not found.outputs
    (tried,) = (point for point in found.points if point.outputs)
    assert tried.quantised == found.chosen.quantised
    assert tried.cost < found.chosen.cost
    assert not tried.feasible
    assert tried.drop > 50
    assert "lose too much: drop +" in shown(found)
    # The graph with them was written before.
    settings = read_passport(workspace.graph(cards.DEMO, "int8")).settings
    assert "outputs" not in settings["scope"]
    assert settings["weight_scales"] == "channel"
    assert not load_recipe(found.recipe).config.scope.outputs
    fresh = load_recipe(Path(tried.recipe)).config
    assert fresh.scope.outputs
    # Its sums are of the same size before the ratios, which is the form for TensorRT-RTX.
    other = searched(workspace, scheme=NAIVE)
    assert other.confirmed
    assert other.outputs
    assert other.evaluations == found.evaluations


def test_products_that_need_8_bit_sums_stay_in_fp16_without_them(
    large: Searched, tmp_path: Path
) -> None:
    # What that search evaluated need not be evaluated again.
    workspace = copied(large.workspace, tmp_path / "artifacts")

    def products(**settings: Any) -> tuple[SearchResult, set[str]]:
        # On this GPU the MLP is faster in INT8 with 8-bit sums only.
        found = searched(workspace, scheme=NAIVE, gpu="Orin-Nano-8GB", **settings)
        inner = (name for name in found.chosen.quantised if not name.startswith("blocks.5."))
        return found, {name.rpartition(".")[2] for name in inner}

    rounded, kinds = products()
    assert rounded.outputs
    assert kinds == {"qkv", "attn", "proj", "fc1", "fc2"}
    # Rounded after the scale of each channel, the sums lose too much.
    plain, kinds = products(backend="tensorrt")
    assert not plain.outputs
    assert plain.confirmed
    assert kinds == {"qkv", "attn", "proj"}
    assert "lose too much: drop +" in shown(plain)
    assert rounded.chosen.cost < plain.chosen.cost
    # It is the choice of a search that may not have them.
    without, _ = products(outputs=False)
    assert without.chosen.quantised == plain.chosen.quantised
    assert without.chosen.cost == plain.chosen.cost


def dying(real: Callable[..., Evaluation], lives: int) -> Callable[..., Evaluation]:
    """``real``, which is interrupted when it is called once more than ``lives`` times."""

    def run(*arguments: Any) -> Evaluation:
        nonlocal lives
        if lives == 0:
            raise KeyboardInterrupt
        lives -= 1
        return real(*arguments)

    return run


def test_an_interrupted_search_ends_at_the_same_graph(
    rounded: Searched,
    demo_workspace: Workspace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workspace = copied(demo_workspace, tmp_path / "copy")
    slots: list[set[str]] = []
    # With 8-bit sums, and on the fresh images.
    for lives in (0, 1):
        mortal = dying(score, lives)
        monkeypatch.setattr(search, "score", mortal)
        monkeypatch.setattr(search_graphs, "score", mortal)
        with pytest.raises(KeyboardInterrupt):
            searched(workspace)
        state = json.loads((workspace.search(cards.DEMO) / "state.json").read_bytes())
        slots.append({slot for slot in state["evaluations"] if " written: " in slot})
        assert not workspace.recipe(cards.DEMO).exists()
    assert [len(each) for each in slots] == [0, 1]
    monkeypatch.undo()
    again = searched(workspace)
    assert again.recipe.read_bytes() == rounded.result.recipe.read_bytes()
    assert graph_sha256(again.artifact.path) == graph_sha256(rounded.result.artifact.path)
    assert again.search == rounded.result.search
    assert again.confirm == rounded.result.confirm
