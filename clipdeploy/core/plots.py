"""Results as pictures, PNG or SVG.

matplotlib is imported only where something is drawn, and without its global state.
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
# Okabe & Ito, "Color Universal Design" (2008): told apart with any colour vision; without the
# yellow, which is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX*"
_GROUP_NAME = re.compile(r' id="[A-Za-z.2]+_[0-9]+"')


def check_plot_path(path: Path) -> str:
    """The image format that a file's suffix asks for.

    Raises:
        UsageError: it is neither ``.png`` nor ``.svg``.
    """
    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise UsageError(f"no plot can be written as {path.name}", hint="end it in .png or .svg")
    return kind


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure as the suffix says; the file appears only when it is whole.

    Raises:
        UsageError: see :func:`check_plot_path`.
        FileError: no permission, no space.
    """
    kind = check_plot_path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=_DPI)


def inline_svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element for an HTML page: the same text for the same figure.

    Its text stays text, in the page's font.  ``name`` keeps the identifiers of the page's figures
    apart.
    """
    import matplotlib

    stream = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with (
        matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # The browser has letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(stream, format="svg", metadata=nothing, transparent=True)
    svg = stream.getvalue().decode()
    # Without prolog, and without the names of groups: nothing refers to them, and every figure
    # has the same.
    return _GROUP_NAME.sub("", svg[svg.index("<svg ") :])


def plain_text(text: str) -> str:
    """A text that matplotlib draws as it is: a dollar sign begins no formula."""
    return text.replace("$", r"\$")


def line_style(index: int, label: str) -> dict[str, Any]:
    """How the line with this number is drawn: colour, marker, error bars."""
    return {
        "label": label,
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 6,
        "linewidth": 1.6,
        "capsize": 3,
        "elinewidth": 1.1,
    }
