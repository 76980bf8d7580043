"""Plots a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clipdeploy.core.plots import line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from clipdeploy.benchmark.result import Benchmark, BenchmarkRow

__all__ = ["draw_benchmark"]

# Horizontal offset between artifacts at one batch, relative to the distance between batches.
_OFFSET = 0.07
# Latencies within this factor of each other get a linear axis from zero, others a log scale.
_LINEAR_RANGE = 5


def draw_benchmark(result: Benchmark) -> Figure:
    """Plot the median latency with a whisker to p90, and the throughput with its interval."""
    from matplotlib.figure import Figure

    from clipdeploy.benchmark.result import hardware

    figure = Figure(figsize=(10, 5.2), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    batches = sorted({row.batch for row in result.rows})
    labels = list(dict.fromkeys(row.label for row in result.rows))
    for index, label in enumerate(labels):
        rows = sorted((row for row in result.rows if row.label == label), key=lambda r: r.batch)
        shift = _OFFSET * (index - (len(labels) - 1) / 2)
        positions = [batches.index(row.batch) + shift for row in rows]
        style = line_style(index, label)
        latency.errorbar(positions, *_latency_points(rows), **style)
        throughput.errorbar(positions, *_throughput_points(rows), **style)
    _format_axes(latency, batches, "latency: median, whisker to p90", "milliseconds per batch")
    _format_axes(throughput, batches, "throughput, with its 95 % interval", "images per second")
    _scale_latency(latency, [row.latency.p50.value for row in result.rows])
    throughput.set_ylim(bottom=0)
    handles, names = latency.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    subject = result.model or ", ".join(labels)
    figure.suptitle(f"{subject}\n{hardware(result)}, {result.rounds} rounds", fontsize=11)
    return figure


def _latency_points(rows: Sequence[BenchmarkRow]) -> tuple[list[float], list[list[float]]]:
    """Medians in milliseconds, and their error bars: zero down, up to p90."""
    medians = [row.latency.p50.value for row in rows]
    tails = [row.latency.p90 for row in rows]
    up = [tail.value - median if tail else 0.0 for tail, median in zip(tails, medians, strict=True)]
    return medians, [[0.0] * len(rows), up]


def _throughput_points(rows: Sequence[BenchmarkRow]) -> tuple[list[float], list[list[float]]]:
    rates = [row.images_per_second for row in rows]
    down = [0.0 if rate.low is None else rate.value - rate.low for rate in rates]
    up = [0.0 if rate.high is None else rate.high - rate.value for rate in rates]
    return [rate.value for rate in rates], [down, up]


def _scale_latency(axes: Axes, medians: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if max(medians) < _LINEAR_RANGE * min(medians):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _format_axes(axes: Axes, batches: Sequence[int], title: str, unit: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axes.set_title(title, fontsize=10)
    axes.set_xlabel("batch (images)")
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.5, len(batches) - 0.5)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.spines[["top", "right"]].set_visible(False)
