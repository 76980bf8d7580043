"""What a benchmark is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

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

__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "BenchmarkRow",
    "benchmark_table",
    "footnotes",
    "hardware",
    "summary_rows",
    "table_rows",
    "table_titles",
]


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
            raise UsageError(f"batches of [{listed}] images", hint=f"each is {BATCH.text}")
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


def hardware(result: Benchmark) -> str:
    """What the artifacts ran on: the GPU, the CPU, or both."""
    here = result.environment
    processor = f"{here.cpu} ({here.cpus} CPUs)" if here.cpus > 1 else here.cpu
    runners = {row.runner for row in result.rows}
    on_cpu = any("(CPU)" in runner for runner in runners)
    on_gpu = any("(CPU)" not in runner for runner in runners)
    parts = [here.gpu or "an unknown GPU"] if on_gpu else []
    return ", ".join([*parts, processor] if on_cpu or not parts else parts)


def _figure(estimate: Estimate | None) -> str:
    """Four digits, or all that stand before the point."""
    if estimate is None:
        return "-"
    return f"{estimate.value:#.4g}" if estimate.value < 999.95 else f"{estimate.value:.0f}"


def _rate(estimate: Estimate) -> str:
    """Three digits, or all that stand before the point."""
    return (
        f"{estimate.value:#.3g}".rstrip(".") if estimate.value < 999.5 else f"{estimate.value:.0f}"
    )


def _margin(estimate: Estimate | None) -> str:
    share = None if estimate is None else estimate.margin
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _cells(row: BenchmarkRow, baseline: str, *, device: bool) -> list[str]:
    latency = row.latency
    times = [_figure(latency.p50), _margin(latency.p50), _figure(latency.p90), _figure(latency.p99)]
    if device:
        times.append(_figure(row.device.p50 if row.device else None))
    speedup = [f"{row.speedup.value:.2f}" if row.speedup else "-", _margin(row.speedup)]
    if row.label == baseline:
        speedup = ["1", ""]
    return [*times, _rate(row.images_per_second), *speedup]


def _has_device(result: Benchmark) -> bool:
    return any(row.device for row in result.rows)


def table_titles(result: Benchmark) -> list[str]:
    """The columns of :func:`table_rows`; the GPU's own time only where one told it."""
    device = ["GPU p50"] if _has_device(result) else []
    return ["artifact", "batch", "p50 ms", "±%", "p90", "p99", *device, "img/s", "speedup", "±%"]


def table_rows(result: Benchmark) -> list[list[str]]:
    """A row for each artifact and batch; the artifact is named in its first one."""
    device, shown, rows = _has_device(result), "", []
    for row in result.rows:
        label = "" if row.label == shown else row.label
        rows.append([label, str(row.batch), *_cells(row, result.baseline, device=device)])
        shown = row.label
    return rows


def _table(result: Benchmark) -> Table:
    table = Table(box=None, pad_edge=False)
    first, *others = table_titles(result)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    for row in table_rows(result):
        # Text: brackets in a file's name are no markup.
        table.add_row(*map(Text, row))
    return table


def footnotes(result: Benchmark) -> list[str]:
    """What the figures are, what ran the artifacts, why one is slow, how far clocks are trusted."""
    lines = [
        f"{result.rounds} rounds; ±% is the 95 % interval, - where the rounds are too few for it",
        f"speedup: latency of {result.baseline} over this one's, of the same round",
    ]
    by_runner: dict[str, list[str]] = {}
    for row in result.rows:
        labels = by_runner.setdefault(row.runner, [])
        if row.label not in labels:
            labels.append(row.label)
    lines += [f"{', '.join(labels)}: {runner}" for runner, labels in by_runner.items()]
    return [*lines, *result.notes, result.environment.note]


def _indented(text: Text) -> Padding:
    return Padding(text, (0, 0, 0, 2))


def benchmark_table(result: Benchmark) -> Group:
    """A row for each artifact and batch, what it rests on, then what was not measured and why."""
    parts: list[RenderableType] = []
    if result.rows:
        subject = result.model or "no model that a passport names"
        parts += [Text(f"{subject} on {hardware(result)}"), Text(""), _table(result), Text("")]
        parts += [_indented(Text(line)) for line in footnotes(result)]
    for left in result.not_run:
        batch = "" if left.batch is None else f", batch {left.batch}"
        text = Text(f"{left.label}{batch}: ")
        parts.append(_indented(text.append(left.reason, style="yellow")))
    return Group(*parts)
