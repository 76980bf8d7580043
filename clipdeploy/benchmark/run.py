"""Runs a benchmark of given files or of a model in the workspace."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from clipdeploy.benchmark.environment import machine_load, read_clocks, read_environment
from clipdeploy.benchmark.lineup import (
    ENGINE,
    GRAPH,
    NotRun,
    models_of,
    open_cases,
    workspace_files,
)
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig, summary_rows
from clipdeploy.benchmark.rounds import Case, Clock, measure
from clipdeploy.core.errors import ClipdeployError, FileError, UsageError
from clipdeploy.core.passport import QUANTISED
from clipdeploy.core.paths import StrPath, as_paths
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.models.cards import takes_any_name
from clipdeploy.runners import open_runner
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_skeleton
from exporters.products import find_products
from exporters.signature import stores_float16

__all__ = ["benchmark_artifacts", "benchmark_model", "warm_up"]

# Shows a line of text while the benchmark runs.
Note = Callable[[str], object]


def _ignore(text: str) -> None:
    """Show nothing."""


def warm_up(
    cases: Sequence[Case],
    not_run: list[NotRun],
    seconds: float,
    *,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter,
) -> list[Case]:
    """Warm up and return the cases that run; append the others to ``not_run``."""
    warm = []
    with progress.task("warm up", len(cases)) as advance:
        for case in cases:
            try:
                case.warm_up(seconds, clock)
                warm.append(case)
            except ClipdeployError as error:
                where = (str(case.path), case.label, case.batch)
                not_run.append(NotRun(*where, error.message))
            advance(1)
    return warm


def _on_cpu(case: Case) -> bool:
    return "(CPU)" in case.runner.name


def _is_mixed(graph: Path) -> bool:
    """Whether a graph has 8-bit products and FP16 tensors, the form made for TensorRT."""
    skeleton = read_skeleton(graph)
    quantised = any(product.precision in QUANTISED for product in find_products(skeleton))
    return quantised and stores_float16(skeleton)


def _notes(cases: Sequence[Case]) -> tuple[str, ...]:
    """Explain why an 8-bit graph for TensorRT is slow on a CPU, if one was measured there."""
    graphs = {each.label: each.path for each in cases if _on_cpu(each)}
    mixed = [label for label, path in graphs.items() if _is_mixed(path)]
    if not mixed:
        return ()
    return (
        f"{', '.join(mixed)}: INT8 or FP8 with FP16 tensors is made for TensorRT; ONNX Runtime "
        "has no kernel for it on a CPU, so it dequantises, computes in FP32 and casts from and to "
        "FP16; `clipdeploy quantize --cpu` makes an INT8 graph for the CPU",
    )


def _announce(
    cases: Sequence[Case], config: BenchmarkConfig, load: float | None, note: Note
) -> None:
    if any(map(_on_cpu, cases)):
        busy = "" if load is None else f" (load {load:.2f} in the last minute)"
        note(f"measuring on the CPU: other programs on this machine affect the latencies{busy}")
    limits = []
    if config.seconds is not None:
        limits.append(f"about {config.seconds * len(cases):.0f} s")
    if config.rounds is not None:
        limits.append(f"{config.rounds} rounds")
    # No progress bar, because its thread would use CPU time.
    note(f"measuring {len(cases)} artifacts and batches for {' or '.join(limits)} ...")


def _benchmark(
    model: str,
    paths: Sequence[Path],
    refused: Mapping[Path, str],
    config: BenchmarkConfig,
    progress: Progress,
    note: Note,
    clock: Clock,
) -> Benchmark:
    load = machine_load()
    open_one = partial(
        open_runner,
        provider=config.provider,
        threads=config.threads,
        trust=config.trust,
        cuda_graph=config.cuda_graph,
    )
    with ExitStack() as stack:
        with progress.task("open"):
            cases, not_run = open_cases(
                paths, config.batches, open_one, stack, refused=refused, seed=config.seed
            )
        cases = warm_up(cases, not_run, config.warmup, progress=progress, clock=clock)
        rounds = 0
        before = read_clocks()
        if cases:
            _announce(cases, config, load, note)
            budget = None if config.seconds is None else config.seconds * len(cases)
            rounds = measure(
                cases, seconds=budget, rounds=config.rounds, seed=config.seed, clock=clock
            )
        after = read_clocks()
    on_gpu = any(not _on_cpu(case) for case in cases)
    return Benchmark(
        model=model,
        baseline=cases[0].label if cases else "",
        config=config,
        rounds=rounds,
        rows=summary_rows(cases),
        not_run=tuple(not_run),
        environment=read_environment(before, after, on_gpu=on_gpu, load=load),
        notes=_notes(cases),
    )


def benchmark_artifacts(
    paths: StrPath | Iterable[StrPath],
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    progress: Progress = SILENT,
    note: Note = _ignore,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Measure ``.onnx`` and ``.engine`` files; speedups are relative to the first that runs.

    Artifacts that cannot run here, and batches that an artifact does not accept, are listed with
    the reason; a batch is never made smaller.  The inputs are random pixels.

    Raises:
        UsageError: no path is given, or one is neither a graph nor an engine.
        FileError: a file does not exist.
    """
    paths = as_paths(paths)
    if not paths:
        raise UsageError("nothing to measure", hint="give .onnx or .engine files")
    for path in paths:
        if path.suffix not in (GRAPH, ENGINE):
            raise UsageError(
                f"{path} is neither .onnx nor .engine", hint="give .onnx or .engine files"
            )
        if not path.is_file():
            raise FileError(f"there is no file {path}", hint="check the path")
    return _benchmark(models_of(paths), paths, {}, config, progress, note, clock)


@takes_any_name
def benchmark_model(
    workspace: Workspace,
    model: str,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    progress: Progress = SILENT,
    note: Note = _ignore,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Measure every graph and engine of ``model``; see :func:`benchmark_artifacts`.

    An artifact that was not made from the files next to it is listed but not measured.

    Raises:
        UsageError: the model has not been exported in the workspace.
    """
    paths, refused = workspace_files(workspace, model, trust=config.trust)
    return _benchmark(model, paths, refused, config, progress, note, clock)
