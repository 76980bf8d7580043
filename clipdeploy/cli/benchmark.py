"""``clipdeploy benchmark``: measure latency and throughput on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.numbers import number, whole_numbers
from clipdeploy.cli.options import option
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.shared_options import (
    model_option,
    picture_option,
    run_threads_option,
    seed_option,
    trust_option,
)
from clipdeploy.cli.usage import command, refuse_together, refuse_unused
from clipdeploy.core.errors import EngineError
from clipdeploy.core.spans import ROUNDS, SECONDS, WARMUP

_CONFIG = "clipdeploy.benchmark.result.BenchmarkConfig"
_SECONDS = default_of(_CONFIG, "seconds")
_BATCHES = "such as 1,8,32"
# What only a measurement uses.
_MEASURING = (
    *("seconds", "rounds", "warmup", "threads", "device", "cuda_graph", "seed", "plot", "trust"),
)


@command(epilog="\b\nclipdeploy benchmark --batch 1,8,32 -o latency.svg")
@click.argument("artifacts", nargs=-1, type=ArtifactPath())
@model_option
@option(
    "--batch",
    default=",".join(map(str, default_of(_CONFIG, "batches"))),
    metavar="N[,N...]",
    help="Images per inference run; several sizes are separated by commas.",
)
@option(
    "--seconds",
    type=number(SECONDS),
    metavar="SECONDS",
    help="Seconds to measure each artifact and batch size.",
    default_text=f"{_SECONDS:g}; no limit with --rounds",
)
@option(
    "--rounds",
    type=number(ROUNDS),
    metavar="COUNT",
    help="Runs of each artifact and batch size; stops at whichever limit comes first.",
    default_text="no limit",
)
@option(
    "--warmup",
    type=number(WARMUP),
    default=default_of(_CONFIG, "warmup"),
    metavar="SECONDS",
    help="Seconds to run each artifact and batch size before measuring.",
)
@run_threads_option
@option(
    "--device",
    type=click.Choice(choices_of(_CONFIG, "provider")),
    default=default_of(_CONFIG, "provider"),
    formerly={"--provider": "--device"},
    help="Device that runs ONNX graphs; auto is the GPU if ONNX Runtime can use it.",
)
@option(
    "--estimate",
    metavar="GPU",
    help="Estimate the times on a GPU from its data sheet, without running anything; list lists "
    "the GPUs.",
    default_text="measure on this machine",
)
@option("--cuda-graph", is_flag=True, help="Replay engines as CUDA graphs.")
@seed_option(_CONFIG, "Seed for the input pixels and the order of runs.")
@picture_option
@trust_option
@stage_command
def benchmark(
    context: Context,
    artifacts: tuple[Path, ...],
    model: str | None,
    batch: str,
    seconds: float | None,
    rounds: int | None,
    warmup: float,
    threads: int,
    device: Literal["auto", "cpu", "cuda"],
    estimate: str | None,
    cuda_graph: bool,
    seed: int,
    plot: Path | None,
    trust: bool,
) -> None:
    """Measure the latency and throughput of artifacts.

    ARTIFACTS are .onnx and .engine files; without any, all artifacts of the model. They run in
    turns, so that their speeds can be compared even on a busy machine.
    """
    refuse_together("artifacts", "model", hint="leave out --model: each file has its own")
    if estimate is not None:
        _estimate(context, estimate, artifacts, model, batch)
        return
    if {path.suffix for path in artifacts} == {".onnx"}:
        refuse_unused(["cuda_graph", "trust"], "engines", "name an .engine file")
    from clipdeploy.core.plots import check_plot_path, save_plot

    if plot:
        check_plot_path(plot)
    from clipdeploy.benchmark import BenchmarkConfig, benchmark_artifacts, benchmark_model
    from clipdeploy.benchmark.plot import draw_benchmark

    config = BenchmarkConfig(
        batches=whole_numbers(batch, "--batch", _BATCHES),
        seconds=_SECONDS if seconds is None and rounds is None else seconds,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        provider=device,
        threads=threads,
        trust=trust,
        cuda_graph=cuda_graph,
    )
    if artifacts:
        run = partial(benchmark_artifacts, artifacts)
    else:
        run = partial(benchmark_model, context.workspace, context.model(model))
    result = run(config, progress=context.progress, note=context.note)
    emit(context, result, lambda: result)
    if not result:
        first = result.not_run[0]
        raise EngineError("nothing could be measured", hint=f"{first.label}: {first.reason}")
    if plot:
        save_plot(draw_benchmark(result), plot)
        context.note(f"picture: {plot}")


def _estimate(
    context: Context, gpu: str, artifacts: tuple[Path, ...], model: str | None, batch: str
) -> None:
    """Estimate the times of artifacts, or of all graphs of a model, on a GPU."""
    refuse_unused(_MEASURING, "a measurement", "leave out --estimate")
    from clipdeploy.benchmark import (
        BenchmarkConfig,
        estimate_artifacts,
        estimate_model,
        known_gpus,
    )

    if gpu.lower() == "list":
        refuse_unused(["artifacts", "model", "batch"], "an estimate", "name a GPU")
        known = known_gpus()
        emit(context, known, lambda: known)
        return
    batches = BenchmarkConfig(batches=whole_numbers(batch, "--batch", _BATCHES)).batches
    if artifacts:
        result = estimate_artifacts(artifacts, gpu, batches)
    else:
        result = estimate_model(context.workspace, context.model(model), gpu, batches)
    emit(context, result, lambda: result)
