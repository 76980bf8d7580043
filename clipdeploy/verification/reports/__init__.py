"""Reports on a verification: an HTML page, Markdown, or JSON, by the suffix of a file's name.

    verdict, heading, baseline     as on the terminal
    a row an artifact              with intervals, the verdict and what it rests on
    what is odd about the images
    the error of the logits        image by image
    the disagreements              drops against their limit, who is right
    the heat map                   of an artifact that was bisected
    the images that stand out      with everybody's answer
    provenance                     files by their hashes, choices, versions

The same results make the same bytes.
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
    """Where an artifact leaves the reference, as ``bisect`` found it.

    ``sha256`` is the artifact's; ``svg`` is a picture as an element of an HTML page.
    """

    artifact: str
    sha256: str
    sentence: str
    svg: str


@dataclass(frozen=True)
class Evidence:
    """What a verdict was made from.

    ``images`` are shown in the HTML page; None leaves them out, and ``why`` says why.
    """

    results: Results
    images: ImageFolder | None = None
    why: str = ""
    heat_map: HeatMap | None = None


def check_report_paths(paths: Sequence[Path]) -> None:
    """Make sure that every report can be written, before the work whose result it shows.

    Raises:
        UsageError: the suffix is that of no report.
        FileError: no permission.
    """
    for path in paths:
        if path.suffix.lower() not in (*HTML, *_MARKDOWN, *_JSON):
            raise UsageError(
                f"no report can be written as {path.name}", hint="end it in .html, .md or .json"
            )
    for path in paths:
        check_writable(path)


def write_report(path: Path, result: Verification, evidence: Evidence) -> None:
    """Write the report that the suffix asks for; it appears only when it is whole.

    Raises:
        UsageError: see :func:`check_report_paths`.
        FileError: no permission, no space.
    """
    check_report_paths([path])
    write_atomic(path, _content(path.suffix.lower(), result, evidence))


def _content(suffix: str, result: Verification, evidence: Evidence) -> bytes:
    if suffix in _JSON:
        return to_json(result) + b"\n"
    # Jinja and matplotlib take a while to import: only for those who want a page.
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
