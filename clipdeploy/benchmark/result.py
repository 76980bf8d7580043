"""Defines the configuration, the result and the table of a benchmark."""

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
from clipdeploy.benchmark.rounds import Case
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
    """What to measure, and for how long.

    ``seconds`` is the time for each artifact and batch, ``rounds`` the number of runs of each; the
    benchmark stops at whichever limit comes first.  ``warmup`` is in seconds for each artifact and
    batch, with at least one run.  ``threads`` is the number of ONNX Runtime's threads within an
    operator, 0 for its default.  ``provider``, ``trust`` and ``cuda_graph`` are passed to
    :func:`clipdeploy.runners.open_runner`.

    Raises:
        UsageError: a number is out of range, a batch is repeated, or there is no limit.
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
            raise UsageError(f"batches of {list(self.batches)} images", hint="give each batch once")
        if self.seconds is None and self.rounds is None:
            raise UsageError("the measurement has no limit", hint="set seconds or rounds")
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

    ``latency`` is end to end, ``device`` the GPU time, None without a GPU; both in milliseconds per
    batch.  ``images_per_second`` is the batch divided by the mean latency.  ``speedup`` is the
    baseline's latency divided by this latency in the same round, None if the baseline does not run
    this batch.  ``warmup`` counts the runs before the first round.
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
    """The result of a benchmark; true if anything was measured.

    ``baseline`` is the label of the artifact that speedups are relative to: the first that ran,
    empty if none did.  ``notes`` are sentences that explain misleading results.
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


def summary_rows(cases: Sequence[Case]) -> tuple[BenchmarkRow, ...]:
    """Summarise the rounds of each case; the first artifact is the baseline."""
    first = cases[0].label if cases else ""
    baseline = {c.batch: c.seconds for c in cases if c.label == first}
    rows = []
    for each in cases:
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
    """The processors that ran the artifacts: the GPU, the CPU, or both."""
    machine = result.environment
    processor = f"{machine.cpu} ({machine.cpus} CPUs)" if machine.cpus > 1 else machine.cpu
    runners = {row.runner for row in result.rows}
    on_cpu = any("(CPU)" in runner for runner in runners)
    on_gpu = any("(CPU)" not in runner for runner in runners)
    parts = [machine.gpu or "an unknown GPU"] if on_gpu else []
    return ", ".join([*parts, processor] if on_cpu or not parts else parts)


def _metric(estimate: Estimate | None, digits: int) -> str:
    """Format with 3 or 4 significant ``digits``, or without decimals from 1000 on."""
    if estimate is None:
        return "-"
    if estimate.value >= 1000 - 0.5 * 10.0 ** (3 - digits):
        return f"{estimate.value:.0f}"
    return f"{estimate.value:#.{digits}g}".rstrip(".")


def _margin(estimate: Estimate | None) -> str:
    share = None if estimate is None else estimate.margin
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if share < 0.0995 else f"{100 * share:.0f}"


def _cells(row: BenchmarkRow, baseline: str, *, device: bool) -> list[str]:
    latency = row.latency
    p50, p90, p99 = (_metric(each, 4) for each in (latency.p50, latency.p90, latency.p99))
    times = [p50, _margin(latency.p50), p90, p99]
    if device:
        times.append(_metric(row.device.p50 if row.device else None, 4))
    speedup = [f"{row.speedup.value:.2f}" if row.speedup else "-", _margin(row.speedup)]
    if row.label == baseline:
        speedup = ["1", ""]
    return [*times, _metric(row.images_per_second, 3), *speedup]


def _has_device(result: Benchmark) -> bool:
    return any(row.device for row in result.rows)


def table_titles(result: Benchmark) -> list[str]:
    """The column titles of :func:`table_rows`; GPU time only if a row has it."""
    device = ["GPU p50"] if _has_device(result) else []
    return ["artifact", "batch", "p50 ms", "±%", "p90", "p99", *device, "img/s", "speedup", "±%"]


def table_rows(result: Benchmark) -> list[list[str]]:
    """One row per artifact and batch; only an artifact's first row has its label."""
    device, previous, rows = _has_device(result), "", []
    for row in result.rows:
        label = "" if row.label == previous else row.label
        rows.append([label, str(row.batch), *_cells(row, result.baseline, device=device)])
        previous = row.label
    return rows


def _table(result: Benchmark) -> Table:
    table = Table(box=None, pad_edge=False)
    first, *others = table_titles(result)
    table.add_column(first, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    for row in table_rows(result):
        # As Text, since brackets in a file name would be read as markup.
        table.add_row(*map(Text, row))
    return table


def footnotes(result: Benchmark) -> list[str]:
    """The lines below the table: units, runners, notes and the reliability of the clocks."""
    lines = [
        f"{result.rounds} rounds; ±% is the 95 % interval, - if there are too few rounds for it",
        f"speedup: latency of {result.baseline} divided by this latency, in the same round",
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
    """The table with its footnotes, and what was not measured, with the reason."""
    parts: list[RenderableType] = []
    if result.rows:
        subject = result.model or "unknown model"
        parts += [Text(f"{subject} on {hardware(result)}"), Text(""), _table(result), Text("")]
        parts += [_indented(Text(line)) for line in footnotes(result)]
    for skipped in result.not_run:
        batch = "" if skipped.batch is None else f", batch {skipped.batch}"
        text = Text(f"{skipped.label}{batch}: ")
        parts.append(_indented(text.append(skipped.reason, style="yellow")))
    return Group(*parts)
