"""Draws a report's plots: the error of the logits per image, and the drops against their limit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipdeploy.core.plots import plain_text
from clipdeploy.verification.paired import DropJudgement
from clipdeploy.verification.reports.evidence import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from clipdeploy.verification.reports.contents import Tone

__all__ = ["TONES", "draw_drops", "draw_spreads"]

# From Okabe & Ito's palette, dark enough for text on white; also used by the page.
TONES = {"good": "#00704f", "bad": "#b3261e", "open": "#8a5a00"}
_INK, _BLUE, _PALE = "#333333", "#0072B2", "#cfe4f3"
_WIDTH, _ROW, _MARGIN = 5.4, 0.46, 1.05
_NAME = 26


def _axes(names: Sequence[str], label: str) -> tuple[Figure, Axes]:
    """Return axes with a line per name, the first on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _MARGIN + _ROW * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, color=_INK)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(colors=_INK)
    return figure, axes


def _short(name: str) -> str:
    """Shorten a name to one line that fits."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    if len(name) > _NAME:
        name = f"{name[: _NAME // 2]}\N{HORIZONTAL ELLIPSIS}{name[-_NAME // 2 + 1 :]}"
    return plain_text(name)


def draw_spreads(spreads: Mapping[str, Spread], output: str) -> Figure:
    """Draw SQNR per image, a box per artifact: quartiles, whiskers from 5 to 95 %, ends as dots."""
    figure, axes = _axes(list(spreads), f"SQNR of an image's {output} (dB), more is better")
    for place, spread in enumerate(spreads.values()):
        finite = [value for value in spread.percentiles if math.isfinite(value)]
        if finite:
            _box(axes, place, [min(max(v, finite[0]), finite[-1]) for v in spread.percentiles])
        else:
            text = "equal to the last bit" if spread.equal else "NaN or infinite"
            where = axes.get_yaxis_transform()
            axes.text(0.5, place, text, transform=where, ha="center", va="center", color=_INK)
    return figure


def _box(axes: Axes, place: int, percentiles: Sequence[float]) -> None:
    worst, low, first, median, third, high, best = percentiles
    stats = {"whislo": low, "q1": first, "med": median, "q3": third, "whishi": high, "fliers": []}
    axes.bxp(
        [stats],
        positions=[place],
        widths=0.5,
        orientation="horizontal",
        manage_ticks=False,
        showfliers=False,
        patch_artist=True,
        boxprops={"facecolor": _PALE, "edgecolor": _BLUE},
        medianprops={"color": _BLUE, "linewidth": 2},
        whiskerprops={"color": _BLUE},
        capprops={"color": _BLUE},
    )
    axes.plot([worst, best], [place, place], ".", color=_BLUE, markersize=5)


def draw_drops(
    drops: Mapping[str, tuple[DropJudgement, Tone]], max_drop: float, judged: str
) -> Figure:
    """Draw the interval of each artifact's drop, coloured by its tone, and the limit.

    ``judged`` is the metric, such as top-1.
    """
    levels = {drop.confidence for drop, _ in drops.values()}
    level = f"{100 * levels.pop():g} % interval" if len(levels) == 1 else "interval"
    figure, axes = _axes(list(drops), f"drop of {judged} (points) and its {level}, less is better")
    axes.axvline(0, color="0.6", linewidth=1)
    axes.axvline(max_drop, color=_INK, linewidth=1.4, linestyle=(0, (4, 3)))
    for place, (drop, tone) in enumerate(drops.values()):
        sides = [[drop.drop - drop.interval.low], [drop.interval.high - drop.drop]]
        # An anytime interval is not centred on the drop, and may not even contain it.
        ends = [[max(side[0], 0.0)] for side in sides]
        color = TONES[tone] if tone else _INK
        axes.errorbar([drop.drop], [place], xerr=ends, fmt="o", color=color, capsize=4, linewidth=2)
    ends_of = [end for drop, _ in drops.values() for end in (drop.interval.low, drop.interval.high)]
    low, high = min(0.0, *ends_of), max(max_drop, *ends_of)
    room = 0.06 * (high - low or 1.0)
    axes.set_xlim(low - room, high + room)
    axes.annotate(
        f"allowed: {max_drop:g}",
        (max_drop, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=_INK,
        fontsize=9,
    )
    return figure
