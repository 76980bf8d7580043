"""Saves matplotlib figures as PNG or SVG.

matplotlib is imported only when a figure is drawn, and its global state is not used.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_plot_path", "inline_svg", "line_style", "plain_text", "save_plot"]

_FORMATS = {".png": "png", ".svg": "svg"}
_DPI = 160
# Okabe & Ito, "Color Universal Design" (2008), distinguishable with any colour vision; without
# yellow, which is too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_GROUP_NAME = re.compile(r' id="[A-Za-z.2]+_[0-9]+"')


def check_plot_path(path: Path) -> str:
    """Return the image format of a file name.

    Raises:
        UsageError: the suffix is neither ``.png`` nor ``.svg``.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"cannot save a plot as {path.name}", hint="use .png or .svg")
    return kind


def save_plot(figure: Figure, path: Path) -> None:
    """Save a figure in the format of the suffix, atomically.

    Raises:
        UsageError: see :func:`check_plot_path`.
        FileError: no permission, no space.
    """
    kind = check_plot_path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=_DPI)


def inline_svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element; equal figures give equal text.

    Text remains text, in the page's font.  ``name`` makes identifiers unique within the page.
    """
    import matplotlib

    stream = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with (
        matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # Glyphs that matplotlib's font lacks are drawn by the browser.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    svg = stream.getvalue().decode()
    # Without the prolog and the ids of groups, which are unused and equal in all figures.
    return _GROUP_NAME.sub("", svg[svg.index("<svg ") :])


def plain_text(text: str) -> str:
    """Escape dollar signs, which start a formula in matplotlib."""
    return text.replace("$", r"\$")


def line_style(index: int, label: str) -> dict[str, Any]:
    """Return matplotlib's keyword arguments for line number ``index``."""
    return {
        "label": label,
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 6,
        "linewidth": 1.6,
        "capsize": 3,
        "elinewidth": 1.1,
    }
