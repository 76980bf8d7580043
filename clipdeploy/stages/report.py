"""Writes reports of a verification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from clipdeploy.core.errors import ArtifactError, DatasetError, UsageError
from clipdeploy.core.passport import read_json
from clipdeploy.core.paths import StrPath, as_path, as_paths
from clipdeploy.imaging import open_images
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.verification.reports import HTML, Evidence, HeatMap, write_report

__all__ = ["write_reports"]


def write_reports(
    judgement: Judgement,
    paths: StrPath | Iterable[StrPath],
    *,
    data: StrPath | None = None,
    bisection: StrPath | None = None,
) -> None:
    """Write a report to each path, in the format of its suffix: .html, .md or .json.

    The HTML page shows images.  After a merge they are read from ``data``, by default from where
    the first shard found them; if they are missing, the page says so.  The heat map in
    ``bisection``, a file of :meth:`~clipdeploy.workspace.folder.Workspace.bisection`, is shown if
    its graph was judged.

    Raises:
        UsageError: the judgement is of a single shard, or a suffix is unknown.
        FileError: a report cannot be written.
    """
    paths = as_paths(paths)
    data = as_path(data)
    bisection = as_path(bisection)
    result, evidence = judgement.verification, judgement.evidence
    if result is None or evidence is None:
        raise UsageError("a shard has no verdict to report", hint="pass --output to `verify merge`")
    pages = any(path.suffix.lower() in HTML for path in paths)
    if pages and evidence.images is None and not evidence.why:
        evidence = _with_images(evidence, data)
    if bisection is not None:
        evidence = replace(evidence, heat_map=_heat_map(bisection, evidence))
    for path in paths:
        write_report(path, result, evidence)


def _heat_map(path: Path, evidence: Evidence) -> HeatMap | None:
    """The heat map of the last bisection, if its graph is one of the judged files."""
    if not path.exists():
        return None
    try:
        found = read_json(path, HeatMap)
    except ArtifactError:
        return None
    judged = {entry.sha256 for entry in evidence.results.run_key.artifacts}
    return found if found.sha256 in judged else None


def _with_images(evidence: Evidence, data: Path | None) -> Evidence:
    try:
        return replace(evidence, images=open_images(data or Path(evidence.results.data)))
    except DatasetError as error:
        return replace(evidence, why=f"the images, because {error.message}")
