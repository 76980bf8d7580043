"""Packages an artifact for production: a Triton model repository or a C++ program."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.passport import Precision
from clipdeploy.core.paths import StrPath
from clipdeploy.engines.passport import read_engine_passport
from clipdeploy.models.cards import takes_any_name
from clipdeploy.packaging.artifact import Packable, open_packable
from clipdeploy.packaging.client import TextModel
from clipdeploy.packaging.cpp import CppPackage, sample_count
from clipdeploy.packaging.cpp import package_cpp as write_program
from clipdeploy.packaging.triton import TritonPackage
from clipdeploy.packaging.triton import package_triton as write_repository
from clipdeploy.packaging.triton_config import TritonConfig
from clipdeploy.stages.samples import sample_images, sample_texts
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.names import artifact_path
from clipdeploy.workspace.proof import ReferenceProof, reference_proof, remove_proof, save_proof

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

    The text tower beside that of an embedding model is added as a second model: its best artifact,
    as in :func:`artifact_to_package`.

    Raises:
        ClipdeployError: see :func:`clipdeploy.packaging.triton.package_triton`.
    """
    artifact = Path(artifact)
    repository = Path(repository)
    source = open_packable(artifact)
    samples = sample_images(source.graph.preprocess, source.fixed_batch or 1)
    if not source.graph.embeds:
        written = write_repository(source, repository, samples, config, force=force)
        return replace(written, reference=_proof_of(source, written.model))
    tower = _text_tower(source)
    text = texts = None
    if tower is not None:
        default = f"{tower.graph.model}-text-{tower.graph.precision}"
        name = f"{config.name}-text" if config.name else default
        named = replace(config, name=name)
        text = write_repository(tower, repository, sample_texts(), named, force=force)
        texts = TextModel(name, tower.graph)
    made = write_repository(source, repository, samples, config, texts=texts, force=force)
    made = replace(made, reference=_proof_of(source, made.model))
    if text is None:
        return replace(made, notes=(*made.notes, _without_texts(source)))
    notes = dict.fromkeys((*made.notes, *text.notes))
    return replace(made, text=text, notes=tuple(notes))


def _text_tower(image: Packable) -> Packable | None:
    """The best artifact of the text tower beside ``image``; None if there is none."""
    folder, passport = image.path.parent, image.graph

    def at(precision: Precision, kind: Literal["onnx", "engine"]) -> Path:
        return artifact_path(folder, passport.model, precision, kind, "text")

    kinds: tuple[Precision, ...] = ("fp16", "fp32")
    engines = [at(each, "engine") for each in kinds]
    paths = [path for path in engines if path.exists() and _can_be_served(path)]
    paths += [path for path in (at(each, "onnx") for each in kinds) if path.exists()]
    return open_packable(paths[0], replace(passport, tower="text"), "text") if paths else None


def _without_texts(source: Packable) -> str:
    return (
        f"there is no text tower in {source.path.parent}, so the client compares images alone; "
        f"clipdeploy export --model {source.graph.model} --text-tower makes it"
    )


def package_cpp(artifact: StrPath, folder: StrPath, *, force: bool = False) -> CppPackage:
    """Write a C++ program that runs ``artifact``, a graph or an engine, into ``folder``.

    Raises:
        ClipdeployError: see :func:`clipdeploy.packaging.cpp.package_cpp`.
    """
    artifact = Path(artifact)
    folder = Path(folder)
    source = open_packable(artifact)
    if source.graph.embeds:
        raise UsageError(
            f"{artifact} gives embeddings, and the C++ program prints the most likely classes",
            hint="package it with --triton, or package a classifier",
        )
    samples = sample_images(source.graph.preprocess, sample_count(source))
    made = write_program(source, folder, samples, force=force)
    return replace(made, reference=_proof_of(source, made.model))


def _proof_of(source: Packable, model: Path) -> ReferenceProof:
    """The proof of the reference of ``source``, which is also written beside its copy ``model``."""
    proof = reference_proof(source.path, source.graph)
    if proof.accuracy is not None:
        save_proof(model, proof.accuracy)
    else:
        remove_proof(model)
    return proof
