"""A benchmark from its options to its result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from clipdeploy.benchmark.environment import machine_load, read_clocks, read_environment
from clipdeploy.benchmark.lineup import ENGINE, GRAPH, NotRun, line_up, models_of, workspace_files
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig, summary_rows
from clipdeploy.benchmark.rounds import Clock, Contender, measure
from clipdeploy.core.errors import ClipdeployError, FileError, UsageError
from clipdeploy.core.paths import StrPath, as_paths
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.models.cards import takes_any_name
from clipdeploy.runners import open_runner
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_skeleton
from exporters.products import find_products
from exporters.signature import stores_float16

__all__ = ["benchmark_artifacts", "benchmark_model", "warm_up"]

# A line for the person who waits.
Note = Callable[[str], object]


def _unheard(text: str) -> None:
    """Nobody waits."""


def warm_up(
    contenders: Sequence[Contender],
    not_run: list[NotRun],
    seconds: float,
    *,
    progress: Progress = SILENT,
    clock: Clock = time.perf_counter,
) -> list[Contender]:
    """Those that run; what fails now goes to ``not_run`` with its own words."""
    warm = []
    with progress.task("warm up", len(contenders)) as advance:
        for contender in contenders:
            try:
                contender.warm_up(seconds, clock)
                warm.append(contender)
            except ClipdeployError as error:
                where = (str(contender.path), contender.label, contender.batch)
                not_run.append(NotRun(*where, error.message))
            advance(1)
    return warm


def _on_cpu(contender: Contender) -> bool:
    return "(CPU)" in contender.runner.name


def _is_mixed(graph: Path) -> bool:
    """Whether a graph has INT8 products and FP16 tensors, as TensorRT takes them."""
    skeleton = read_skeleton(graph)
    int8 = any(product.precision == "int8" for product in find_products(skeleton))
    return int8 and stores_float16(skeleton)


def _notes(contenders: Sequence[Contender]) -> tuple[str, ...]:
    """Why an INT8 graph for TensorRT is slow on a CPU, where one was measured there."""
    graphs = {each.label: each.path for each in contenders if _on_cpu(each)}
    mixed = [label for label, path in graphs.items() if _is_mixed(path)]
    if not mixed:
        return ()
    return (
        f"{', '.join(mixed)}: INT8 with FP16 around it is for TensorRT; ONNX Runtime has no "
        "integer kernel for it on a CPU: it dequantises, computes in FP32 and casts from and to "
        "FP16 between; `clipdeploy quantize --cpu` makes the INT8 graph for a CPU",
    )


def _announce(
    contenders: Sequence[Contender], config: BenchmarkConfig, load: float | None, note: Note
) -> None:
    if any(map(_on_cpu, contenders)):
        busy = "" if load is None else f" (load {load:.2f} in the last minute)"
        note(f"measuring on the CPU: whatever else runs on this machine disturbs{busy}")
    limits = []
    if config.seconds is not None:
        limits.append(f"about {config.seconds * len(contenders):.0f} s")
    if config.rounds is not None:
        limits.append(f"{config.rounds} rounds")
    # No bar: the thread that draws one would take its share of the processor.
    note(f"measuring {len(contenders)} artifacts and batches for {' or '.join(limits)} ...")


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
            contenders, not_run = line_up(
                paths, config.batches, open_one, stack, refused=refused, seed=config.seed
            )
        contenders = warm_up(contenders, not_run, config.warmup, progress=progress, clock=clock)
        rounds = 0
        before = read_clocks()
        if contenders:
            _announce(contenders, config, load, note)
            budget = None if config.seconds is None else config.seconds * len(contenders)
            rounds = measure(
                contenders, seconds=budget, rounds=config.rounds, seed=config.seed, clock=clock
            )
        after = read_clocks()
    on_gpu = any(not _on_cpu(contender) for contender in contenders)
    return Benchmark(
        model=model,
        baseline=contenders[0].label if contenders else "",
        config=config,
        rounds=rounds,
        rows=summary_rows(contenders),
        not_run=tuple(not_run),
        environment=read_environment(before, after, on_gpu=on_gpu, load=load),
        notes=_notes(contenders),
    )


def benchmark_artifacts(
    paths: StrPath | Iterable[StrPath],
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    progress: Progress = SILENT,
    note: Note = _unheard,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Measure ``.onnx`` and ``.engine`` files; speedups are relative to the first that runs.

    What cannot run here is listed with the reason, and so is a batch that an artifact does not
    take: no batch is ever made smaller.  The inputs are random pixels.

    Raises:
        UsageError: no path, or one that is neither a graph nor an engine.
        FileError: a file that does not exist.
    """
    paths = as_paths(paths)
    if not paths:
        raise UsageError("nothing to measure", hint="name .onnx or .engine files")
    for path in paths:
        if path.suffix not in (GRAPH, ENGINE):
            raise UsageError(f"{path} is neither .onnx nor .engine", hint="name such files")
        if not path.is_file():
            raise FileError(f"there is no file {path}", hint="check its spelling")
    return _benchmark(models_of(paths), paths, {}, config, progress, note, clock)


@takes_any_name
def benchmark_model(
    workspace: Workspace,
    model: str,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    progress: Progress = SILENT,
    note: Note = _unheard,
    clock: Clock = time.perf_counter,
) -> Benchmark:
    """Measure every graph and engine of ``model``; see :func:`benchmark_artifacts`.

    An artifact that was not made from what lies beside it is listed and not measured.

    Raises:
        UsageError: the model has not been exported in the workspace.
    """
    paths, refused = workspace_files(workspace, model, trust=config.trust)
    return _benchmark(model, paths, refused, config, progress, note, clock)
