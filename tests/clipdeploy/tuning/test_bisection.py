"""Bisection names a planted fault exactly, and finds no culprit in a healthy model.

Covers: clipdeploy/tuning/culprit.py, clipdeploy/tuning/linears.py, clipdeploy/tuning/result.py,
    clipdeploy/tuning/taps.py, clipdeploy/tuning/drawing.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import planted
import pytest
from click.testing import CliRunner

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from calibration.qdq import quantize
from calibration.scheme import SchemeConfig
from clipdeploy.cli.main import main
from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.passport import PASSPORT_KEY, Recipe, from_json, to_json
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import BisectConfig, Workspace, bisect_model, export_model, sample_images
from clipdeploy.tuning import bisection
from clipdeploy.tuning.result import Bisection

TEST = cards.demo_file("test.zip")
# One thread, because two wait for each other on a busy machine.
FEW = BisectConfig(4, batch=4, threads=1)
Plant = Callable[[Path, Path, str], Path]


def bisected(
    workspace: Workspace, graph: Path | None = None, config: BisectConfig = FEW
) -> Bisection:
    return bisect_model(workspace, cards.DEMO, TEST, graph, config)


@pytest.fixture(scope="module")
def demo_workspace(
    demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> Workspace:
    """A copy, because bisect saves its last finding in the workspace."""
    folder = tmp_path_factory.mktemp("bisected") / "artifacts"
    shutil.copytree(demo_workspace.root, folder)
    return Workspace(folder)


@pytest.fixture(scope="module")
def healthy(demo_workspace: Workspace) -> Bisection:
    return bisected(demo_workspace, config=BisectConfig(8, batch=8, threads=1))


def test_no_block_of_a_healthy_model_stands_out(healthy: Bisection) -> None:
    assert healthy.culprits == ()
    assert healthy.sentence.startswith("No block stands out")


def test_fp16_is_healthy_too(demo_workspace: Workspace) -> None:
    found = bisected(demo_workspace, demo_workspace.graph(cards.DEMO, "fp16"))
    assert found.culprits == ()
    assert found.precision == "fp16"


def test_quantised_attention_is_a_part(demo_workspace: Workspace, tmp_path: Path) -> None:
    graph = tmp_path / "attention.onnx"
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)
    config = QuantizeConfig(scope=Scope(attention=True, outputs=True), weight_scales="ratio")
    source, calibration = (
        demo_workspace.graph(cards.DEMO, "fp32"),
        demo_workspace.calibration(cards.DEMO),
    )
    quantize(source, calibration, graph, samples, config)
    found = bisected(demo_workspace, graph)
    parts = {part.name: part for part in found.measured.parts}
    # The last block's attention is not quantised.
    assert (parts["blocks.5.attn"].alone_db or 99) > (parts["blocks.4.attn"].alone_db or 99) + 10
    assert found.culprits == ()


def test_powers_of_parts_add_up(healthy: Bisection) -> None:
    measured = healthy.measured
    summed = sum(10 ** -(part.alone_db / 10) for part in measured.parts if part.alone_db)
    whole = 10 ** -((measured.fidelity.sqnr_db or 0) / 10)
    # Powers of independent errors add up; 3 dB for interactions in later blocks.
    assert 0.5 < summed / whole < 2
    assert sum(part.share for part in measured.parts) == pytest.approx(1)


@pytest.mark.parametrize(
    ("plant", "linear", "reason"),
    [
        (planted.small_scale, "blocks.0.attn.qkv", "cuts off"),
        (planted.small_scale, "blocks.1.mlp.fc1", "cuts off"),
        (planted.small_scale, "blocks.3.attn.proj", "cuts off"),
        (planted.small_scale, "blocks.5.mlp.fc2", "cuts off"),
        (planted.small_weight_scale, "blocks.2.attn.qkv", "0.125 times"),
        (planted.small_weight_scale, "blocks.4.attn.proj", "0.125 times"),
        (planted.three_bits, "blocks.0.mlp.fc2", "7 of 255 levels"),
        (planted.three_bits, "blocks.1.attn.proj", "7 of 255 levels"),
        (planted.three_bits, "blocks.3.mlp.fc1", "7 of 255 levels"),
        (planted.three_bits, "blocks.4.mlp.fc2", "7 of 255 levels"),
        (planted.three_bits, "blocks.5.attn.qkv", "7 of 255 levels"),
    ],
)
def test_the_planted_linear_is_named(
    demo_workspace: Workspace, tmp_path: Path, plant: Plant, linear: str, reason: str
) -> None:
    graph = plant(demo_workspace.graph(cards.DEMO, "int8"), tmp_path / "planted.onnx", linear)
    found = bisected(demo_workspace, graph)
    assert [culprit.name for culprit in found.culprits] == [linear]
    assert found.sentence.startswith(f"{linear} costs ")
    assert reason in found.sentence


@pytest.mark.parametrize("block", [0, 2, 4])
def test_an_outlier_that_cannot_be_folded_is_named(
    demo_workspace: Workspace, tmp_path: Path, block: int
) -> None:
    workspace = Workspace(tmp_path)
    source = workspace.graph(cards.DEMO, "fp32")
    source.parent.mkdir(parents=True)
    planted.outlier_behind_gelu(demo_workspace.graph(cards.DEMO, "fp32"), source, block)
    samples = sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)
    graph = workspace.graph(cards.DEMO, "int8-cpu")
    config = QuantizeConfig(remainder="fp32", scheme=SchemeConfig("minmax"), min_sqnr=None)
    planted.quantised(source, graph, samples, config)
    found = bisected(workspace, graph)
    assert [culprit.name for culprit in found.culprits] == [f"blocks.{block}.mlp.fc2"]
    assert "its input has one channel at 31" in found.sentence


def test_a_fault_costs_points_and_restoring_gives_them_back(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    source = demo_workspace.graph(cards.DEMO, "int8")
    name = "blocks.0.mlp.fc2"
    graph = planted.small_weight_scale(source, tmp_path / "planted.onnx", name)
    found = bisected(demo_workspace, graph, BisectConfig(20, batch=20, threads=1))
    measured = found.measured
    part = next(part for part in measured.parts if part.name == name)
    assert measured.drop > 5
    assert part.cost is not None
    assert part.restored_drop is not None
    assert part.cost == measured.drop - part.restored_drop > 5
    assert f"{part.cost:.1f} of the {measured.drop:.1f} points" in found.sentence


class Counted:
    """A progress that records the total and the finished units of each task."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[int | None, int]] = {}

    @contextmanager
    def task(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.tasks[text] = (total, 0)
        yield lambda count: self.tasks.update({text: (total, self.tasks[text][1] + count)})


def test_in_a_large_network_only_the_largest_shares_are_restored(
    demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, healthy: Bisection
) -> None:
    assert all(part.restored_db is not None for part in healthy.measured.parts)
    monkeypatch.setattr(bisection, "_FEW_PARTS", 10)
    monkeypatch.setattr(bisection, "_RESTORED_PARTS", 3)
    name = "blocks.3.mlp.fc1"
    graph = planted.three_bits(
        demo_workspace.graph(cards.DEMO, "int8"), tmp_path / "planted.onnx", name
    )
    progress = Counted()
    found = bisect_model(demo_workspace, cards.DEMO, TEST, graph, FEW, progress=progress)
    parts = sorted(found.measured.parts, key=lambda part: -part.share)
    blocks = {block.name for block in found.measured.blocks}
    # patch_embed and head are both blocks and parts; they are restored as blocks.
    restored = [p.name for p in parts if p.cost is not None and p.name not in blocks]
    assert restored == [p.name for p in parts if p.name not in blocks][:3]
    assert all(block.restored_db is not None for block in found.measured.blocks)
    assert [culprit.name for culprit in found.culprits] == [name]
    (culprit,) = found.culprits
    assert culprit.gain_db is not None
    assert culprit.gain_db > 1.2
    # NumPy's numbers have no JSON form until they are Python's.
    assert from_json(to_json(found), type(found), "the result") == found
    # Alone: 30 parts and 8 blocks, two of them parts as well; restored: the 8 blocks and 3 parts.
    assert progress.tasks["bisect"] == (38 + 11, 38 + 11)


def test_the_number_of_evaluations_is_known_from_the_start(demo_workspace: Workspace) -> None:
    progress = Counted()
    config = BisectConfig(3, batch=2, threads=1)
    bisect_model(demo_workspace, cards.DEMO, TEST, config=config, progress=progress)
    assert progress.tasks["bisect"] == (2 * (38 + 38), 2 * (38 + 38))


def test_without_passport_and_without_labels(demo_workspace: Workspace, tmp_path: Path) -> None:
    model = onnx.load(demo_workspace.graph(cards.DEMO, "int8"))
    kept = [entry for entry in model.metadata_props if entry.key != PASSPORT_KEY]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    graph = tmp_path / "bare.onnx"
    onnx.save(model, graph)
    found = bisected(demo_workspace, graph)
    assert (found.precision, found.culprits) == ("unknown", ())


def test_a_graph_of_other_weights_is_refused(demo_workspace: Workspace, tmp_path: Path) -> None:
    other = Workspace(tmp_path)
    export_model(other, cards.DEMO, WeightsChoice(random_seed=1))
    with pytest.raises(ArtifactError, match="does not match the reference: weights is"):
        bisected(other, demo_workspace.graph(cards.DEMO, "int8"))
    with pytest.raises(UsageError, match="does not exist"):
        bisected(other)


def test_command_prints_json_and_draws(demo_workspace: Workspace, tmp_path: Path) -> None:
    plot = tmp_path / "map.svg"
    words = ["bisect", "--workspace", str(demo_workspace.root), "--model", cards.DEMO]
    words += ["--data", str(TEST), "--images", "4", "--threads", "1", "--output", str(plot)]
    result = CliRunner().invoke(main, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert len(found["measured"]["parts"]) == 24 + 6 + 2
    assert "No block stands out" in found["sentence"]
    assert "<svg" in plot.read_text()
    refused = CliRunner().invoke(main, [*words[:-1], str(tmp_path / "map.gif")])
    assert refused.exit_code == 2


def test_table_fits_a_terminal(healthy: Bisection) -> None:
    from rich.console import Console

    from clipdeploy.tuning.result import bisection_table

    console = Console(width=80)
    with console.capture() as capture:
        console.print(bisection_table(healthy))
    shown = capture.get()
    assert "…" not in shown
    assert all(part.name in shown for part in healthy.measured.parts if "rest" not in part.name)


def test_decibels_are_of_the_logits(healthy: Bisection) -> None:
    finite = [part.alone_db for part in healthy.measured.parts if part.alone_db is not None]
    assert np.isfinite(finite).all()
    assert min(finite) > (healthy.measured.fidelity.sqnr_db or 0)
