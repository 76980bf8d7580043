"""The cost models of a search for engines: estimated by a roofline, or measured on this GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from calibration.formats import FORMATS, FormatName
from calibration.policy import find_linears
from clipdeploy.core.device import Gpu, driver, gpus
from clipdeploy.core.errors import EngineError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.progress import Progress
from clipdeploy.engines.backends import (
    BackendOption,
    choose_backend,
    targets_capabilities,
    tensorrt_module,
)
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.compiler import computes
from clipdeploy.engines.gpus import DEFAULT_GPU, gpu_or_default, local_gpu
from clipdeploy.engines.roofline import Formats, Geometry, block_products, geometry_of
from clipdeploy.stages.search_engines import EngineTimer
from clipdeploy.tuning.cost import CostModel
from clipdeploy.tuning.engine_costs import Timer, estimated_costs, timed_costs, timed_variants
from clipdeploy.tuning.engine_times import Conditions, PairTimer, forget_times, kept_times
from clipdeploy.tuning.search import SearchConfig
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.headers import graph_sha256

__all__ = ["CostRun", "budget_ended", "engine_models", "ideal", "rank", "timed_gpu"]


@dataclass(frozen=True)
class CostRun:
    """What the costs of a search's engines depend on; ``deadline`` is of :func:`time.monotonic`."""

    workspace: Workspace
    model: str
    config: SearchConfig
    backend: BackendOption
    deadline: float | None
    note: Callable[[str], object]
    progress: Progress


def rank(form: FormatName, cost: float) -> tuple[float, int]:
    """Sorts choices by relative cost; less than 1 % counts less than the order of FORMATS.

    No cost is that exact, and INT8 is the more accurate one.
    """
    return round(cost, 2), tuple(FORMATS).index(form)


def ideal(form: FormatName, costs: CostModel, *, outputs: bool) -> tuple[float, int]:
    """The rank of a format's fastest choice; with 8-bit sums if ``outputs`` allows them."""
    return rank(form, costs.least(outputs=outputs))


def budget_ended(when: str) -> UsageError:
    """The error if the minutes of a search are used up without a result."""
    return UsageError(
        f"the budget ended {when}",
        hint="allow more minutes with --budget; the results so far are reused",
    )


def engine_models(run: CostRun) -> dict[FormatName, CostModel]:
    """The costs in each format, that which can be fastest first; empty if no engine is timed.

    Raises:
        UsageError: the GPU does not have the format, or the budget ended.
        ClipdeployError: an engine cannot be built or timed.
    """
    source, passport = run.workspace.source(run.model)
    if run.config.cost not in ("roofline", "gpu"):
        return {}
    depth = 1 + max(site.block for site in find_linears(load_graph(source)))
    geometry = geometry_of(passport, depth)
    measured = run.config.cost == "gpu"
    costs = _measured(run, geometry) if measured else _estimated(run, geometry)
    outputs = run.config.tries_outputs
    order = sorted(costs, key=lambda form: ideal(form, costs[form], outputs=outputs))
    return {form: costs[form] for form in order}


def _estimated(run: CostRun, geometry: Geometry) -> dict[FormatName, CostModel]:
    config = run.config
    if not config.gpu and local_gpu() is None:
        run.note(
            f"times are estimated for {DEFAULT_GPU}: this machine has no GPU with a data sheet here"
        )
    gpu = gpu_or_default(config.gpu)
    formats = config.formats(form for form in FORMATS if gpu.rate(form) is not None)
    return {form: estimated_costs(geometry, gpu, config.batch, form) for form in formats}


def timed_gpu() -> Gpu:
    """The GPU of this machine, on which engines are timed.

    Raises:
        EngineError: there is none.
    """
    if not gpus():
        raise EngineError(
            "the cost model gpu times engines on a GPU, and this machine has none",
            hint="choose --cost roofline, which estimates the times from a data sheet",
        )
    return gpus()[0]


def _formats(config: SearchConfig, gpu: Gpu) -> tuple[FormatName, ...]:
    """The formats to search, all of which the GPU computes.

    Raises:
        UsageError: the one asked for is not among them.
    """
    able = [form for form in FORMATS if computes(form, gpu.compute_capability)]
    formats = config.formats(able)
    for form in formats:
        if form not in able:
            raise UsageError(
                f"{gpu.name} ({gpu.sm}) has no {FORMATS[form].label} products",
                hint="search INT8, or use a GPU of compute capability 8.9 or later",
            )
    return formats


def _measured(run: CostRun, geometry: Geometry) -> dict[FormatName, CostModel]:
    gpu = timed_gpu()
    formats = _formats(run.config, gpu)
    build, conditions = _conditions(run, gpu)
    path = run.workspace.search(run.model) / "times.json"
    source, _ = run.workspace.source(run.model)
    order = [name for at in range(geometry.depth) for name in block_products(geometry, at)]
    count = sum(len(timed_variants(geometry, form)) for form in formats)
    with (
        scratch_folder() as folder,
        run.progress.task(f"time engines on {gpu.name}", count) as step,
    ):
        calibration = run.workspace.calibration(run.model)
        timer = EngineTimer(*(source, calibration, tuple(order), run.config.scheme, build, folder))
        kept = kept_times(_before(run.deadline, timer), path, conditions)
        return {
            form: _checked(run, geometry, form, _stepping(kept, step), path, conditions)
            for form in formats
        }


def _conditions(run: CostRun, gpu: Gpu) -> tuple[BuildConfig, Conditions]:
    """How engines are built for this GPU, and what their times depend on.

    Raises:
        BuildError: no backend can be used.
    """
    backend, batch = choose_backend(run.backend).backend, run.config.batch
    module, installed = tensorrt_module(backend), driver()
    build = BuildConfig(
        backend,
        profiles=((batch, batch, batch),),
        compute_capability=(gpu.capability,) if targets_capabilities(module) else (),
    )
    return build, Conditions(
        gpu=gpu.name,
        sm=gpu.sm,
        driver=installed.version if installed else "",
        cuda=installed.cuda if installed else "",
        backend=backend,
        backend_version=str(module.__version__),
        batch=batch,
        graph=graph_sha256(run.workspace.source(run.model)[0]),
        calibration=sha256_file(run.workspace.calibration(run.model)),
        scheme=run.config.scheme,
    )


def _checked(
    run: CostRun,
    geometry: Geometry,
    form: FormatName,
    timer: Timer,
    path: Path,
    conditions: Conditions,
) -> CostModel:
    """The measured costs, with a note if they are doubtful; useless ones are not kept."""
    found = timed_costs(geometry, timer, run.config.batch, form, conditions.gpu)
    try:
        found.check()
    except EngineError:
        forget_times(path, conditions)
        raise
    if found.doubt:
        run.note(f"{found.doubt}; remove {path} to measure again")
    return found.costs


def _before(deadline: float | None, measure: PairTimer) -> PairTimer:
    """Check the deadline before each call of ``measure``."""

    def limited(formats: Formats) -> tuple[float, float]:
        if deadline is not None and time.monotonic() > deadline:
            raise budget_ended("while engines were timed")
        return measure(formats)

    return limited


def _stepping(timer: Timer, advance: Callable[[int], None]) -> Timer:
    """Return ``timer`` with one step of progress for each call."""

    def stepping(formats: Formats) -> float:
        found = timer(formats)
        advance(1)
        return found

    return stepping
