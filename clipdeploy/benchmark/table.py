"""A benchmark as a table: its cells for whoever shows them, and as the terminal does."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clipdeploy.benchmark.latency import Estimate
from clipdeploy.benchmark.result import Benchmark, BenchmarkRow

__all__ = ["benchmark_table", "footnotes", "hardware", "table_rows", "table_titles"]


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
