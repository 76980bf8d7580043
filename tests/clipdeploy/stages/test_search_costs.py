"""Costs of engines that a search minimises: from a stand-in for a GPU's times, and refusals."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from demo_workspaces import few_digits
from rich.console import Console

from calibration.formats import FORMATS, FormatName
from clipdeploy.cli.main import main
from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import EngineError, UsageError
from clipdeploy.core.progress import SILENT
from clipdeploy.engines.backends import Backend
from clipdeploy.engines.gpus import find_gpu
from clipdeploy.engines.roofline import Formats, Geometry, engine_seconds, kernels
from clipdeploy.models import cards
from clipdeploy.pipeline import SearchConfig, Workspace, search_model
from clipdeploy.stages import search_costs
from clipdeploy.stages.search_costs import CostRun, engine_models, ideal
from clipdeploy.stages.search_engines import EngineTimer
from clipdeploy.tuning.engine_costs import estimated_costs, timed_variants

TEST = cards.demo_file("test.zip")
GEOMETRY = Geometry.of_card(cards.find(cards.DEMO))
HOPPER = Gpu("NVIDIA H100 80GB HBM3", (9, 0))
ENGINES = len(timed_variants(GEOMETRY, "int8"))


class StandIn:
    """Times of engines by the roofline of an H100, as if they had been measured.

    ``asked`` are the formats; ``factor`` is applied to the engine with the most products in 8
    bits, ``dies`` is the number of the call that Ctrl-C interrupts.
    """

    def __init__(self) -> None:
        self.asked: list[Formats] = []
        self.factor, self.dies = 1.0, 0

    def __call__(self, timer: EngineTimer, formats: Formats) -> tuple[float, float]:
        self.asked.append(formats)
        if len(self.asked) == self.dies:
            raise KeyboardInterrupt
        ((batch, _, _),) = timer.build.profiles
        half, own = (
            1e6 * engine_seconds(kernels(GEOMETRY, each, batch), find_gpu("H100-SXM"))
            for each in ({}, formats)
        )
        whole = len(formats) == len(timed_variants(GEOMETRY, "int8")[-1])
        return half, own * (self.factor if whole else 1.0)


@pytest.fixture
def stand_in(tensorrt_rtx: None, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A machine with an H100, whose engines take as long as the roofline says."""
    made = StandIn()
    monkeypatch.setattr(search_costs, "gpus", lambda: (HOPPER,))
    monkeypatch.setattr(EngineTimer, "__call__", lambda timer, formats: made(timer, formats))
    return made


@pytest.fixture
def workspace(demo_workspace: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return Workspace(tmp_path / "artifacts")


def cost_run(workspace: Workspace, notes: list[str], **settings: Any) -> CostRun:
    config = SearchConfig(**{"cost": "gpu", "batch": 120, **settings})
    return CostRun(workspace, cards.DEMO, config, "tensorrt-rtx", None, notes.append, SILENT)


def test_formats_begin_with_the_one_that_can_be_fastest_with_the_sums_it_may_have() -> None:
    geometry = Geometry.of_card(cards.find("clip-vit-base-p32"))
    costs = {form: estimated_costs(geometry, find_gpu("L4"), 8, form) for form in FORMATS}

    def first(*, outputs: bool) -> FormatName:
        return min(FORMATS, key=lambda form: ideal(form, costs[form], outputs=outputs))

    # With 8-bit sums everything is as fast in INT8 as in FP8, and INT8 is the more accurate one.
    assert first(outputs=True) == "int8"
    # Without them FP8 in fc2 is faster, beside an FP16 fc1 that computes GELU.
    assert first(outputs=False) == "fp8"


def times_file(workspace: Workspace) -> Path:
    return workspace.search(cards.DEMO) / "times.json"


def test_measured_costs_choose_what_the_same_estimated_costs_choose(
    stand_in: StandIn, workspace: Workspace
) -> None:
    place = {"batch": 120, "search_images": 120, "max_drop": 10.0, "threads": 1}
    # Half to search on, and half to confirm on.
    data = few_digits(workspace.folder(cards.DEMO) / "digits.zip", 24)

    def search(**settings: Any) -> Any:
        config = SearchConfig(**place, fixed_scheme=True, **settings)
        return search_model(workspace, cards.DEMO, data, config, backend="tensorrt-rtx")

    found, expected = search(cost="gpu"), search(gpu="H100-SXM")
    assert found.confirmed
    assert found.costs.kind == "gpu"
    assert found.chosen.quantised == expected.chosen.quantised
    assert found.outputs
    assert found.chosen.cost == pytest.approx(expected.chosen.cost, rel=1e-9)
    assert found.evaluations == expected.evaluations
    stream = io.StringIO()
    Console(file=stream, width=200).print(found)
    assert "cost: microseconds measured on NVIDIA H100 80GB HBM3, batch 120" in stream.getvalue()
    # FP16 is the same engine for both formats.
    assert len(stand_in.asked) == 2 * ENGINES - 1
    # A second search measures nothing.
    assert search(cost="gpu").chosen == found.chosen
    assert len(stand_in.asked) == 2 * ENGINES - 1


def test_an_interrupted_measurement_goes_on(stand_in: StandIn, workspace: Workspace) -> None:
    run = cost_run(workspace, [], format="int8")
    stand_in.dies = 6
    with pytest.raises(KeyboardInterrupt):
        engine_models(run)
    (saved,) = json.loads(times_file(workspace).read_bytes())["measured"]
    assert len(saved["microseconds"]) == 5
    assert saved["conditions"]["gpu"] == HOPPER.name
    resumed = engine_models(run)
    assert len(stand_in.asked) == ENGINES + 1
    times_file(workspace).unlink()
    assert engine_models(run) == resumed


def test_another_batch_is_measured_on_its_own(stand_in: StandIn, workspace: Workspace) -> None:
    many, few = (cost_run(workspace, [], format="int8", batch=batch) for batch in (120, 8))
    engine_models(many)
    engine_models(few)
    assert len(stand_in.asked) == 2 * ENGINES
    engine_models(many)
    assert len(stand_in.asked) == 2 * ENGINES


def test_doubtful_times_are_noted_and_useless_ones_not_kept(
    stand_in: StandIn, workspace: Workspace
) -> None:
    notes: list[str] = []
    run = cost_run(workspace, notes, format="int8")
    engine_models(run)
    assert notes == []
    times_file(workspace).unlink()
    stand_in.factor = 1.1
    engine_models(run)
    (note,) = notes
    assert "the measured times contradict each other" in note
    assert note.endswith(f"; remove {times_file(workspace)} to measure again")
    times_file(workspace).unlink()
    stand_in.factor = 1.5
    with pytest.raises(EngineError, match="contradict each other"):
        engine_models(run)
    stand_in.factor = 1.0
    before = len(stand_in.asked)
    engine_models(run)
    assert len(stand_in.asked) == before + ENGINES


def test_the_budget_includes_the_measurement(stand_in: StandIn, workspace: Workspace) -> None:
    run = replace(cost_run(workspace, []), deadline=0.0)
    with pytest.raises(UsageError, match="budget ended while engines were timed"):
        engine_models(run)
    assert stand_in.asked == []


def test_a_gpu_without_fp8(
    stand_in: StandIn, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_costs, "gpus", lambda: (Gpu("NVIDIA A10", (8, 6)),))
    assert list(engine_models(cost_run(workspace, []))) == ["int8"]
    with pytest.raises(UsageError, match=r"NVIDIA A10 \(SM 8\.6\) has no FP8 products"):
        engine_models(cost_run(workspace, [], format="fp8"))


def test_progress_counts_the_engines(stand_in: StandIn, workspace: Workspace) -> None:
    tasks: list[list[Any]] = []

    class Recorder:
        @contextmanager
        def task(self, text: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
            tasks.append([text, total, 0])

            def advance(count: int) -> None:
                tasks[-1][2] += count

            yield advance

    engine_models(replace(cost_run(workspace, []), progress=Recorder()))
    assert tasks == [[f"time engines on {HOPPER.name}", 2 * ENGINES, 2 * ENGINES]]


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_without_a_gpu_the_estimate_is_named(workspace: Workspace) -> None:
    place = ["--workspace", str(workspace.root), "--model", cards.DEMO, "--data", str(TEST)]
    result = CliRunner().invoke(main, ["search", *place, "--cost", "gpu"])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "times engines on a GPU, and this machine has none" in line
    assert "--cost roofline" in line
    assert not workspace.search(cards.DEMO).exists()


@pytest.mark.gpu
@pytest.mark.slow
def test_a_search_measures_on_this_gpu(gpu_backend: Backend, workspace: Workspace) -> None:
    config = SearchConfig(
        cost="gpu", format="int8", batch=32, search_images=120, max_drop=10.0, fixed_scheme=True
    )
    notes: list[str] = []
    found = search_model(
        workspace, cards.DEMO, TEST, config, backend=gpu_backend, note=notes.append
    )
    assert found.costs.gpu == gpus()[0].name
    saved = times_file(workspace).read_bytes()
    search_model(workspace, cards.DEMO, TEST, config, backend=gpu_backend)
    assert times_file(workspace).read_bytes() == saved
