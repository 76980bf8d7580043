"""Packages an artifact for production: a Triton model repository or a C++ program."""

from __future__ import annotations

from pathlib import Path

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.passport import Precision
from clipdeploy.core.paths import StrPath
from clipdeploy.engines.passport import read_engine_passport
from clipdeploy.models.cards import takes_any_name
from clipdeploy.packaging.artifact import open_packable
from clipdeploy.packaging.cpp import CppPackage, sample_count
from clipdeploy.packaging.cpp import package_cpp as write_program
from clipdeploy.packaging.triton import TritonPackage
from clipdeploy.packaging.triton import package_triton as write_repository
from clipdeploy.packaging.triton_config import TritonConfig
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace.folder import Workspace

__all__ = ["artifact_to_package", "package_cpp", "package_triton"]

_ENGINES: tuple[Precision, ...] = ("int8", "fp8", "fp16", "fp32")
# FP16 first: ONNX Runtime has few INT8 kernels for GPUs.
_GRAPHS: tuple[Precision, ...] = ("fp16", "fp32", "int8", "int8-cpu")


@takes_any_name
def artifact_to_package(workspace: Workspace, model: str) -> Path:
    """The best artifact of a model to package: a TensorRT engine with its weights, else a graph.

    Raises:
        UsageError: there is no artifact.
    """
    for precision in _ENGINES:
        engine = workspace.engine(model, precision)
        if engine.exists() and _can_be_served(engine):
            return engine
    for precision in _GRAPHS:
        graph = workspace.graph(model, precision)
        if graph.exists():
            return graph
    raise UsageError(
        f"there is no artifact of {model} in {workspace.root}",
        hint=f"clipdeploy export --model {model}",
    )


def _can_be_served(engine: Path) -> bool:
    try:
        passport = read_engine_passport(engine)
    except ArtifactError:
        return False
    return passport.backend == "tensorrt" and passport.has_weights


def package_triton(
    artifact: StrPath,
    repository: StrPath,
    config: TritonConfig = TritonConfig(),
    *,
    force: bool = False,
) -> TritonPackage:
    """Add ``artifact``, a graph or an engine, to the model ``repository`` of a Triton server.

    Raises:
        ClipdeployError: see :func:`clipdeploy.packaging.triton.package_triton`.
    """
    artifact = Path(artifact)
    repository = Path(repository)
    source = open_packable(artifact)
    samples = sample_images(source.graph.preprocess, source.fixed_batch or 1)
    return write_repository(source, repository, samples, config, force=force)


def package_cpp(artifact: StrPath, folder: StrPath, *, force: bool = False) -> CppPackage:
    """Write a C++ program that runs ``artifact``, a graph or an engine, into ``folder``.

    Raises:
        ClipdeployError: see :func:`clipdeploy.packaging.cpp.package_cpp`.
    """
    artifact = Path(artifact)
    folder = Path(folder)
    source = open_packable(artifact)
    samples = sample_images(source.graph.preprocess, sample_count(source))
    return write_program(source, folder, samples, force=force)
