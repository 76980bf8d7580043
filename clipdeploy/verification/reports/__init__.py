"""Writes reports on a verification: HTML, Markdown or JSON, by the suffix of the file name.

    verdict, heading, baseline     as on the terminal
    a row per artifact             with intervals, the verdict and its reason
    problems with the images
    error of the logits            per image
    disagreements                  drops against their limit, who is right
    heat map                       of an artifact that was bisected
    images with the largest errors with all answers
    provenance                     files by their hashes, settings, versions

The same results give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import check_writable, write_atomic
from clipdeploy.core.passport import to_json
from clipdeploy.imaging import ImageFolder
from clipdeploy.verification.result import Verification
from clipdeploy.verification.results import Results

__all__ = ["HTML", "Evidence", "HeatMap", "check_report_paths", "write_report"]

HTML = (".html", ".htm")
_MARKDOWN = (".md", ".markdown")
_JSON = (".json",)


@dataclass(frozen=True)
class HeatMap:
    """Where an artifact diverges from the reference, as found by ``bisect``.

    ``sha256`` is the artifact's; ``svg`` is a picture as an element of an HTML page.
    """

    artifact: str
    sha256: str
    sentence: str
    svg: str


@dataclass(frozen=True)
class Evidence:
    """The records behind a verdict.

    ``images`` are shown in the HTML page; None leaves them out, and ``why`` gives the reason.
    """

    results: Results
    images: ImageFolder | None = None
    why: str = ""
    heat_map: HeatMap | None = None


def check_report_paths(paths: Sequence[Path]) -> None:
    """Check that every report can be written, before the work that it reports.

    Raises:
        UsageError: a suffix is not that of a report.
        FileError: no permission.
    """
    for path in paths:
        if path.suffix.lower() not in (*HTML, *_MARKDOWN, *_JSON):
            raise UsageError(
                f"{path.name} is not a report: its suffix is none of .html, .md and .json",
                hint="choose a name that ends in .html, .md or .json",
            )
    for path in paths:
        check_writable(path)


def write_report(path: Path, result: Verification, evidence: Evidence) -> None:
    """Write the report for the suffix of ``path``, atomically.

    Raises:
        UsageError: see :func:`check_report_paths`.
        FileError: no permission, no space.
    """
    check_report_paths([path])
    write_atomic(path, _content(path.suffix.lower(), result, evidence))


def _content(suffix: str, result: Verification, evidence: Evidence) -> bytes:
    if suffix in _JSON:
        return to_json(result) + b"\n"
    # Jinja and matplotlib are slow to import: only for pages.
    from clipdeploy.verification.reports.contents import contents_of
    from clipdeploy.verification.reports.pages import html_page, markdown_page
    from clipdeploy.verification.reports.thumbnails import Thumbnails, make_thumbnails

    contents = contents_of(evidence.results, result)
    if suffix in _MARKDOWN:
        return markdown_page(contents, evidence.heat_map).encode()
    if evidence.images is None:
        thumbnails = Thumbnails(missing=[evidence.why])
        return html_page(contents, thumbnails, evidence.heat_map).encode()
    wanted = {worst.name for worst in contents.worst}
    records = [record for record in evidence.results.records if record.name in wanted]
    spec = evidence.results.run_key.preprocess
    thumbnails = make_thumbnails(records, evidence.images, spec)
    return html_page(contents, thumbnails, evidence.heat_map).encode()
