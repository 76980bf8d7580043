"""Draws bisections and searches with matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clipdeploy.tuning.result import Bisection
from clipdeploy.tuning.search import SearchResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bisection", "draw_front"]

_ROLES = ("attn.qkv", "attn", "attn.proj", "mlp.fc1", "mlp.fc2", "rest")
# Errors beyond this are float32 rounding; equal tensors are drawn with this value.
_EQUAL_DB = 120.0


def draw_bisection(result: Bisection, *, titled: bool = True) -> Figure:
    """Draw a heat map of blocks and Linears beside a curve of the error after each block.

    A cell's colour and number are the SQNR of the logits in dB with only that Linear from the
    candidate; darker is worse.  Culprits are framed.  ``titled`` adds the finding as a title.
    """
    from matplotlib.figure import Figure

    measured = result.measured
    blocks = [block.name for block in measured.blocks if block.name.startswith("blocks.")]
    figure = Figure(figsize=(9.6, 1.6 + 0.34 * len(blocks)), layout="constrained")
    cells, curve = figure.subplots(1, 2, width_ratios=(3, 2))
    _heat_map(cells, result, blocks)
    grown = [(b.name, _finite(b.grown_db)) for b in measured.blocks]
    curve.plot([db for _, db in grown], range(len(grown)), color="#0072B2", marker="o")
    curve.set_yticks(range(len(grown)), [name for name, _ in grown])
    curve.invert_yaxis()
    curve.set_xlabel("SQNR, dB")
    curve.set_title("output of each block, whole candidate", fontsize=10)
    curve.grid(color="0.9", linewidth=0.8)
    curve.spines[["top", "right"]].set_visible(False)
    if titled:
        figure.suptitle(f"{result.model}: {result.sentence}", fontsize=9, wrap=True)
    return figure


def _finite(value: float | None) -> float:
    return _EQUAL_DB if value is None else float(np.clip(value, -30.0, _EQUAL_DB))


def _heat_map(axes: Axes, result: Bisection, blocks: list[str]) -> None:
    from matplotlib.patches import Rectangle

    parts = {part.name: _finite(part.alone_db) for part in result.measured.parts}
    roles = [role for role in _ROLES if f"{blocks[0]}.{role}" in parts]
    values = np.asarray([[parts[f"{block}.{role}"] for role in roles] for block in blocks])
    image = axes.imshow(values, cmap="magma", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < middle else "black"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    culprits = {culprit.name for culprit in result.culprits}
    for row, block in enumerate(blocks):
        for column, role in enumerate(roles):
            if f"{block}.{role}" in culprits:
                corner = (column - 0.5, row - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#56B4E9", lw=3))
    axes.set_xticks(range(len(roles)), [role.rpartition(".")[2] for role in roles])
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_title("SQNR of the logits with this part alone, dB", fontsize=10)
    axes.figure.colorbar(image, ax=axes)


def draw_front(result: SearchResult) -> Figure:
    """Plot drop over cost of all evaluated combinations, with the front and the choice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [p.cost for p in result.points], [p.drop for p in result.points], s=18, color="0.75"
    )
    front = [point for point in result.points if point.front]
    axes.step(
        [p.cost for p in front],
        [p.drop for p in front],
        where="post",
        color="#0072B2",
        marker="o",
        label="front",
    )
    for point in result.points:
        if point.label:
            axes.annotate(
                point.label,
                (point.cost, point.drop),
                xytext=(6, 6),
                textcoords="offset points",
                fontsize=9,
            )
    chosen = result.chosen
    axes.scatter([chosen.cost], [chosen.drop], s=90, marker="*", color="#D55E00", label="chosen")
    axes.axhline(result.search.max_drop, color="0.4", linewidth=1, linestyle="--")
    axes.set_xlabel(f"cost over all FP16 ({result.costs.unit})")
    axes.set_ylabel("points of top-1 lost on the search images")
    axes.set_title(f"{result.model}: {result.search.n} images", fontsize=10)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
