"""What a benchmark is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipdeploy.benchmark.environment import Environment
from clipdeploy.benchmark.latency import Estimate, Latency, per_second, ratio, summarise
from clipdeploy.benchmark.lineup import NotRun
from clipdeploy.benchmark.rounds import Contender
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import (
    BATCH,
    ROUNDS,
    SECONDS,
    SEED,
    THREADS,
    WARMUP,
    check_numbers,
    shown,
)
from clipdeploy.runners import Provider

__all__ = ["Benchmark", "BenchmarkConfig", "BenchmarkRow", "summary_rows"]


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured, and for how long.

    ``seconds`` is the time for each artifact and batch, ``rounds`` the number of runs of each;
    with both, what is over first ends it.  ``warmup`` is in seconds for each artifact and batch,
    one run at least.  ``threads`` are ONNX Runtime's within an operator, 0 for its own choice.
    ``provider``, ``trust`` and ``cuda_graph`` are those of
    :func:`clipdeploy.runners.open_runner`.

    Raises:
        UsageError: a number that means nothing.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    seconds: float | None = 3.0
    rounds: int | None = None
    warmup: float = 0.5
    seed: int = 0
    provider: Provider = "auto"
    threads: int = 0
    trust: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if not self.batches or any(batch not in BATCH for batch in self.batches):
            listed = ", ".join(map(shown, self.batches))
            raise UsageError(f"batches of [{listed}] images", hint=f"each is {BATCH.words}")
        if len(set(self.batches)) < len(self.batches):
            raise UsageError(f"batches of {list(self.batches)} images", hint="name each once")
        if self.seconds is None and self.rounds is None:
            raise UsageError("a measurement without an end", hint="give seconds or rounds")
        check_numbers(
            self,
            seconds=SECONDS.or_none,
            rounds=ROUNDS.or_none,
            warmup=WARMUP,
            seed=SEED,
            threads=THREADS,
        )


@dataclass(frozen=True)
class BenchmarkRow:
    """One artifact at one batch.

    ``latency`` is end to end, ``device`` the GPU's own, None where there is none; both in
    milliseconds a batch.  ``images_per_second`` is batch over mean latency.  ``speedup`` is the
    baseline's latency over this one's in the same round, None where the baseline does not run this
    batch.  ``warmup`` counts the runs before the first round.
    """

    artifact: str
    label: str
    runner: str
    batch: int
    warmup: int
    rounds: int
    latency: Latency
    device: Latency | None
    images_per_second: Estimate
    speedup: Estimate | None


@dataclass(frozen=True)
class Benchmark(Shown):
    """The result, true if anything was measured.

    ``baseline`` is the label that speedups are relative to: the first artifact that ran, empty if
    none did.  ``notes`` are sentences that explain figures which would mislead by themselves.
    """

    model: str
    baseline: str
    config: BenchmarkConfig
    rounds: int
    rows: tuple[BenchmarkRow, ...]
    not_run: tuple[NotRun, ...]
    environment: Environment
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __rich__(self) -> Renderable:
        from clipdeploy.benchmark.table import benchmark_table

        return benchmark_table(self)


def summary_rows(contenders: Sequence[Contender]) -> tuple[BenchmarkRow, ...]:
    """What the rounds of each say; the first one's label is the baseline."""
    first = contenders[0].label if contenders else ""
    baseline = {c.batch: c.seconds for c in contenders if c.label == first}
    rows = []
    for each in contenders:
        latency = summarise(each.seconds)
        reference = baseline.get(each.batch)
        rows.append(
            BenchmarkRow(
                artifact=str(each.path),
                label=each.label,
                runner=each.runner.name,
                batch=each.batch,
                warmup=each.warmup,
                rounds=len(each.seconds),
                latency=latency,
                device=summarise(each.device) if each.device else None,
                images_per_second=per_second(each.batch, latency.mean),
                speedup=ratio(reference, each.seconds) if reference else None,
            )
        )
    return tuple(rows)
