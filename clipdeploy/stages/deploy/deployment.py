"""The result of a deployment: artifacts, verdict, packages and open points."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from clipdeploy.benchmark import Benchmark
from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.passport import Precision
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.packaging.cpp import CppPackage
from clipdeploy.packaging.dockerfile import docker_commands
from clipdeploy.packaging.triton import TritonPackage
from clipdeploy.stages.stage_log import StageRun
from clipdeploy.verification.result import Verification, artifact_names
from exporters.headers import GraphArtifact

__all__ = ["Deployment", "Packages", "commands_of", "open_points", "serve_commands"]


@dataclass(frozen=True)
class Packages:
    """The packages of a deployment; ``why_not`` says why there are none, if they were requested.

    ``artifacts`` are the packaged files, in the order of ``made``.
    """

    artifacts: tuple[Path, ...] = ()
    triton: TritonPackage | None = None
    cpp: CppPackage | None = None
    why_not: str = ""

    @property
    def made(self) -> tuple[TritonPackage | CppPackage, ...]:
        """The packages that were made."""
        return tuple(made for made in (self.triton, self.cpp) if made is not None)


@dataclass(frozen=True)
class Deployment(Shown):
    """A precision of a model, built and judged; true only if the verdict passed.

    ``passed``: all judged artifacts are equivalent to PyTorch; otherwise there are no packages.
    ``open_points`` has a sentence for each thing that was not proven.  ``serve`` are the commands
    that build and start the packages.  ``calibration_images`` is the number of calibration images,
    None without calibration.  ``report`` is the page of the verification, ``page`` that of the
    deployment.
    """

    model: str
    precision: Precision
    passed: bool
    graphs: tuple[GraphArtifact, ...]
    engines: tuple[EngineArtifact, ...]
    calibration_images: int | None
    verification: Verification
    benchmark: Benchmark | None
    packages: Packages
    serve: tuple[str, ...]
    open_points: tuple[str, ...]
    report: Path
    page: Path
    stages: tuple[StageRun, ...]

    def __bool__(self) -> bool:
        return self.passed

    def __rich__(self) -> Renderable:
        tables = [self.verification, *([self.benchmark] if self.benchmark else [])]
        points = [Padding(Text(point), (0, 0, 0, 2)) for point in self.open_points]
        lines = [*self.packages_in_words, f"Summary: {self.page}"]
        parts = [part for table in tables for part in (table, Text(""))]
        # Commands and paths, which are copied, are never wrapped.
        whole = [Text(line, no_wrap=True, overflow="ignore") for line in lines]
        return Group(*parts, Text("Not proven:"), *points, Text(""), *whole)

    @property
    def packages_in_words(self) -> tuple[str, ...]:
        """Lines with the packages and their commands, or the reason why there are none."""
        if self.packages.why_not:
            return (f"No package: {self.packages.why_not}",)
        return tuple(
            line
            for made in self.packages.made
            for line in (f"Package: {made.path}", *(f"  -> {each}" for each in commands_of(made)))
        )


def serve_commands(packages: Packages) -> tuple[str, ...]:
    """The commands that build, start and test all packages."""
    return tuple(command for made in packages.made for command in commands_of(made))


def commands_of(made: TritonPackage | CppPackage) -> tuple[str, ...]:
    """The commands that build and start a package, run from the folder of the deployment."""
    if isinstance(made, CppPackage):
        return made.commands
    folder = shlex.quote(str(made.path))
    client = shlex.quote(str(made.path / "client.py"))
    docker = docker_commands(made.name, folder, gpus=True, known=made.server is not None)
    return (*docker, f"python {client} IMAGE{' --text TEXT' if made.text else ''}")


def open_points(
    verification: Verification,
    engines: Sequence[EngineArtifact],
    benchmark: Benchmark | None,
    packages: Packages,
) -> tuple[str, ...]:
    """A sentence for each thing that was not proven; never empty."""
    return (
        *_of_the_verdict(verification),
        *_of_the_engines(verification, engines),
        *_of_the_images(verification),
        *_of_the_speed(benchmark, engines),
        *_of_the_packages(packages, verification),
    )


def _of_the_verdict(verification: Verification) -> Iterator[str]:
    baseline = verification.baseline
    judged = verification.labelled and not verification.random_weights
    if judged and not _is_proven(verification):
        yield f"PyTorch's own accuracy, baseline {baseline.status}: {baseline.sentence}"
    for name, row in zip(artifact_names(verification), verification.rows, strict=True):
        if row.verdict != "equivalent":
            yield f"{name}, {row.verdict}: {row.reason}"


def _is_proven(verification: Verification) -> bool:
    """Whether PyTorch's accuracy was confirmed, now or earlier, or its logits by a probe.

    A probe says nothing about the labels, so it does not replace an accuracy that is published.
    """
    status, proof = verification.baseline.status, verification.reference_proof
    if status == "confirmed":
        return True
    if proof is None or not verification.baseline:
        return False
    return proof.accuracy is not None or ("probe" in proof.by and status == "unpublished")


def _of_the_engines(verification: Verification, engines: Sequence[EngineArtifact]) -> Iterator[str]:
    judged = {row.artifact for row in verification.rows}
    for engine in engines:
        if str(engine.path) not in judged:
            yield (
                f"{engine.path.name} was built but not executed: the verdict is on the graph that "
                "it was compiled from, run by ONNX Runtime"
            )
        for remark in engine.remarks:
            yield f"{engine.path.name}: {remark}"


def _of_the_images(verification: Verification) -> Iterator[str]:
    if skipped := len(verification.skipped):
        were = "images were" if skipped > 1 else "image was"
        yield f"{skipped:,} {were} unreadable and not used"
    # Each artifact that was calibrated has them.
    found = (finding for row in verification.rows for finding in row.calibration_findings)
    for finding in dict.fromkeys(found):
        yield f"the calibration: {finding}"


def _of_the_speed(benchmark: Benchmark | None, engines: Sequence[EngineArtifact]) -> Iterator[str]:
    if benchmark is None:
        yield "no latency was measured"
        return
    for left in benchmark.not_run:
        batch = "" if left.batch is None else f" at batch {left.batch}"
        yield f"the latency of {left.label}{batch} was not measured: {left.reason}"
    measured = {row.artifact for row in benchmark.rows}
    if benchmark and not any(str(engine.path) in measured for engine in engines):
        yield "the latencies are those of graphs in ONNX Runtime, not of the engine"


def _of_the_packages(packages: Packages, verification: Verification) -> Iterator[str]:
    if packages.triton:
        yield "no server has loaded the model repository here"
        ran = any(row.kind == "engine" for row in verification.rows)
        if ran and packages.triton.model.suffix == ".onnx":
            yield (
                "Triton cannot load TensorRT-RTX engines and gets the graph, which was judged as "
                "well: its speed there was not measured"
            )
    if packages.cpp:
        yield "the C++ program was not compiled here; its own test compares it with Python's logits"
