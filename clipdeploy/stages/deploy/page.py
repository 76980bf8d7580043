"""Writes the page of a deployment and the same content as JSON, into the model's folder.

The page has the style and the table of a verification's report.  It leaves out the times of the
stages, so that equal results give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.files import sha256_file, write_atomic
from clipdeploy.core.passport import to_json
from clipdeploy.stages.deploy.deployment import Deployment, commands_of
from clipdeploy.verification.results import Results

__all__ = ["BuiltFile", "built_files", "write_pages"]

_TEMPLATES = "stages/deploy/templates"


@dataclass(frozen=True)
class BuiltFile:
    """A file of a deployment: its kind, size, hash, and how it was made."""

    path: Path
    kind: str
    bytes: int
    sha256: str
    made: str


def built_files(result: Deployment, calibration: Path | None) -> Iterator[BuiltFile]:
    """The graphs, the calibration and the engines, in the order in which they were made."""
    for graph in result.graphs:
        kind = f"{graph.passport.precision} graph"
        yield BuiltFile(graph.path, kind, graph.bytes, graph.sha256, f"{graph.nodes} nodes")
    if calibration is not None:
        images = f"{result.calibration_images} images"
        size, digest = calibration.stat().st_size, sha256_file(calibration)
        yield BuiltFile(calibration, "calibration", size, digest, images)
    for engine in result.engines:
        passport = engine.passport
        made = f"{passport.backend} {passport.backend_version}, {passport.built_on}"
        kind = f"{passport.graph.precision} engine"
        yield BuiltFile(engine.path, kind, passport.plan_bytes, passport.hashes.plan, made)


def write_pages(result: Deployment, results: Results, calibration: Path | None) -> None:
    """Write the page, and the same content as JSON beside it.

    Raises:
        FileError: no permission or no space.
    """
    write_atomic(result.page.with_suffix(".json"), to_json(result) + b"\n")
    write_atomic(result.page, _page(result, results, calibration).encode())


def _page(result: Deployment, results: Results, calibration: Path | None) -> str:
    # Imported here because Jinja and matplotlib take long to import.
    from markupsafe import Markup

    from clipdeploy.benchmark.plot import draw_benchmark
    from clipdeploy.benchmark.result import footnotes, hardware, table_rows, table_titles
    from clipdeploy.verification.reports.contents import contents_of
    from clipdeploy.verification.reports.pages import drawn, render

    measured = result.benchmark if result.benchmark else None
    return render(
        "deployment.html.jinja",
        _TEMPLATES,
        r=contents_of(results, result.verification),
        d=result,
        files=list(built_files(result, calibration)),
        report=result.report.name,
        hardware=hardware(measured) if measured else "",
        packages=[
            (artifact.name, made, commands_of(made))
            for artifact, made in zip(result.packages.artifacts, result.packages.made, strict=True)
        ],
        titles=table_titles(measured) if measured else [],
        rows=table_rows(measured) if measured else [],
        footnotes=footnotes(measured) if measured else [],
        plot=drawn(draw_benchmark(measured), "benchmark") if measured else Markup(),
    )
