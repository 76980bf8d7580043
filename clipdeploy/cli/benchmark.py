"""``clipdeploy benchmark``: how fast the artifacts are here."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import click

from clipdeploy.cli.common import (
    Context,
    emit,
    model_option,
    stage_command,
    trust_option,
)
from clipdeploy.cli.numbers import number, whole_numbers
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.usage import command, refuse_together, refuse_unused
from clipdeploy.core.errors import EngineError
from clipdeploy.core.spans import ROUNDS, SECONDS, SEED, THREADS, WARMUP


@command(epilog="\b\nclipdeploy benchmark --batch 1,8,32 --plot latency.svg")
@click.argument("artifacts", nargs=-1, type=ArtifactPath())
@model_option
@click.option(
    "--batch", default="1,8,32", show_default=True, help="Images at once; several with commas."
)
@click.option(
    "--seconds", type=number(SECONDS), help="Time for each artifact and batch.  [default: 3]"
)
@click.option(
    "--rounds", type=number(ROUNDS), help="Runs of each; with --seconds, what is over first counts."
)
@click.option(
    "--warmup",
    type=number(WARMUP),
    default=0.5,
    show_default=True,
    help="Seconds of running before, for each artifact and batch.",
)
@click.option(
    "--threads",
    type=number(THREADS),
    default=0,
    help="ONNX Runtime's on the CPU; 0: its own choice.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where ONNX graphs run.",
)
@click.option("--cuda-graph", is_flag=True, help="Replay engines as CUDA graphs.")
@click.option(
    "--seed",
    type=number(SEED),
    default=0,
    show_default=True,
    help="Of the pixels and of the order.",
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: .png or .svg."
)
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
    provider: Literal["auto", "cpu", "cuda"],
    cuda_graph: bool,
    seed: int,
    plot: Path | None,
    trust: bool,
) -> None:
    """Measure latency and throughput of ARTIFACTS (.onnx, .engine), or of all of a model's.

    They take turns, in rounds, so that their ratios hold on a busy machine too.
    """
    refuse_together("artifacts", "model", hint="no --model beside files: each has its own")
    if {path.suffix for path in artifacts} == {".onnx"}:
        refuse_unused(["cuda_graph", "trust"], "engines", "name an .engine file")
    from clipdeploy.core.plots import check_plot_path, save_plot

    if plot:
        check_plot_path(plot)
    from clipdeploy.benchmark import BenchmarkConfig, benchmark_artifacts, benchmark_model
    from clipdeploy.benchmark.plot import draw_benchmark

    config = BenchmarkConfig(
        batches=whole_numbers(batch, "--batch", "such as 1,8,32"),
        seconds=3.0 if seconds is None and rounds is None else seconds,
        rounds=rounds,
        warmup=warmup,
        seed=seed,
        provider=provider,
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
        context.note(f"drawn: {plot}")
