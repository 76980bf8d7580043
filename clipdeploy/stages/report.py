"""A verification as files that a person reads or a program does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clipdeploy.imaging import open_images
from clipdeploy.stages.verify_setup import Judgement
from clipdeploy.verification.reports import HTML, Evidence, write_report
from exporters.errors import DatasetError, UsageError

__all__ = ["write_reports"]


def write_reports(judgement: Judgement, paths: Sequence[Path], *, data: Path | None = None) -> None:
    """Write a report at each path: ``.html``, ``.md`` or ``.json``.

    The HTML page shows images.  After a merge they are looked for at ``data``, else where the first
    shard found them; where they are not, the page says so.

    Raises:
        UsageError: a shard alone, or a suffix that is that of no report.
        FileError: a report cannot be written.
    """
    result, evidence = judgement.verification, judgement.evidence
    if result is None or evidence is None:
        raise UsageError("a shard has no verdict to report", hint="pass --report to `verify merge`")
    pages = any(path.suffix.lower() in HTML for path in paths)
    if pages and evidence.images is None:
        evidence = _with_images(evidence, data)
    for path in paths:
        write_report(path, result, evidence)


def _with_images(evidence: Evidence, data: Path | None) -> Evidence:
    try:
        return replace(evidence, images=open_images(data or Path(evidence.results.data)))
    except DatasetError as error:
        return replace(evidence, why=f"the images, because {error.message}")
