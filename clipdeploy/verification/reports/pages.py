"""Renders the contents of a report as HTML or Markdown, with templates that escape every value.

The page needs no network and no script: pictures and style are inline, and its content security
policy blocks anything else.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from typing import TYPE_CHECKING

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clipdeploy.core.plots import inline_svg
from clipdeploy.core.printable import printable
from clipdeploy.verification.reports.contents import Contents
from clipdeploy.verification.reports.drawings import TONES, draw_drops, draw_spreads
from clipdeploy.verification.reports.thumbnails import Thumbnails

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clipdeploy.verification.reports import HeatMap

__all__ = ["drawn", "html_page", "markdown_page", "render"]

_TEMPLATES = "verification/reports/templates"
# Characters with a meaning inside a line or a table cell, in GitHub-flavoured Markdown too.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~$#&])")


def html_page(contents: Contents, thumbnails: Thumbnails, heat_map: HeatMap | None = None) -> str:
    """Return a self-contained HTML page."""
    error = drops = Markup()
    if contents.spreads:
        error = drawn(draw_spreads(contents.spreads, contents.output), "error")
    if contents.drops:
        drops = drawn(draw_drops(contents.drops, contents.max_drop, contents.judged), "drops")
    return render(
        "report.html.jinja",
        r=contents,
        thumbnails=thumbnails,
        error=error,
        drops=drops,
        heat_map=heat_map,
        picture=b64encode(heat_map.svg.encode()).decode() if heat_map else "",
    )


def markdown_page(contents: Contents, heat_map: HeatMap | None = None) -> str:
    """Return the same texts in the same order as Markdown, GitHub-flavoured for the tables."""
    return render("report.md.jinja", html=False, r=contents, heat_map=heat_map)


def drawn(figure: Figure, name: str) -> Markup:
    """Return a figure as inline SVG; ``name`` keeps its identifiers unique in the page."""
    # Safe: matplotlib has escaped the texts, and nothing else is external input.
    return Markup(inline_svg(figure, name))


def render(template: str, folder: str = _TEMPLATES, *, html: bool = True, **values: object) -> str:
    """Render a template of ``folder``; it may extend and include the templates of a report."""
    folders = dict.fromkeys((folder, _TEMPLATES))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("clipdeploy", each) for each in folders]),
        autoescape=html,
        finalize=None if html else _markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["db"] = _db
    environment.globals["tones"] = TONES
    return environment.get_template(template).render(**values)


def _markdown(value: object) -> str:
    """Return a value as one line of literal text in Markdown."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(str(value).split())))


def _db(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else ("equal" if value > 0 else "-")
