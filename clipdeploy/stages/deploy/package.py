"""Packages a deployment if its verdict passed."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.errors import ArtifactError
from clipdeploy.engines.builder import EngineArtifact
from clipdeploy.packaging.artifact import open_packable
from clipdeploy.stages.deploy.config import DeployConfig
from clipdeploy.stages.deploy.deployment import Packages
from clipdeploy.stages.package import package_cpp, package_triton
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.workspace.folder import Workspace

__all__ = ["make_packages", "no_packages"]


def make_packages(
    workspace: Workspace,
    model: str,
    config: DeployConfig,
    engine: EngineArtifact,
    judgement: Judgement,
    *,
    force: bool = False,
) -> Packages:
    """Package the judged engine if it was executed, else the graph that it was compiled from.

    Triton cannot load TensorRT-RTX engines, so it gets the graph, which was judged as well.  A
    model that the repository contains already gets a new version.

    Raises:
        ArtifactError: a file has changed since it was judged, or a folder contains something else.
        FileError: no permission or no space.
    """
    graph = workspace.graph(model, config.precision)
    ran = str(engine.path) in _judged(judgement)
    for_triton = engine.path if ran and engine.passport.backend == "tensorrt" else graph
    for_cpp = engine.path if ran else graph
    triton = cpp = None
    if config.triton or not config.cpp:
        _refuse_changed(for_triton, judgement)
        repository = config.triton or workspace.triton(model)
        triton = package_triton(for_triton, repository)
    if config.cpp:
        _refuse_changed(for_cpp, judgement)
        cpp = package_cpp(for_cpp, config.cpp, force=force)
    held = (*((for_triton,) if triton else ()), *((for_cpp,) if cpp else ()))
    return Packages(held, triton, cpp)


def no_packages(
    workspace: Workspace, model: str, config: DeployConfig, judgement: Judgement
) -> Packages:
    """The reason for not packaging, and packages that an earlier deployment left."""
    assert judgement.verification is not None  # only a shard has none
    older = [path for path in _places(workspace, model, config) if path.exists()]
    there = f"; {', '.join(map(str, older))} is from an earlier verdict" if older else ""
    if {row.verdict for row in judgement.verification.rows} == {"equivalent", "not executed"}:
        or_graph = ", or pass --graphs-only to deploy the graph"
        return Packages(
            why_not="the engine was not executed; run the same command on a machine that can run "
            f"it, which reuses all results{'' if config.precision == 'fp8' else or_graph}{there}"
        )
    return Packages(why_not=f"the verdict does not allow one{there}")


def _places(workspace: Workspace, model: str, config: DeployConfig) -> list[Path]:
    places = [config.cpp] if config.cpp else []
    if config.triton or not config.cpp:
        places.append((config.triton or workspace.triton(model)) / f"{model}-{config.precision}")
    return places


def _judged(judgement: Judgement) -> dict[str, str]:
    """The artifacts that were run, and the SHA-256 of their files at that time."""
    assert judgement.evidence is not None
    artifacts = judgement.evidence.results.run_key.artifacts
    return {entry.artifact: entry.sha256 for entry in artifacts if entry.runner}


def _refuse_changed(artifact: Path, judgement: Judgement) -> None:
    if open_packable(artifact).sha256 != _judged(judgement).get(str(artifact)):
        raise ArtifactError(
            f"{artifact} is not the file that was judged", hint="run the same command again"
        )
