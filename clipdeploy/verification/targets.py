"""Finds the artifacts to judge, in a workspace or among named files, and opens them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clipdeploy.core.errors import EngineError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import CONTEXT, Passport, Precision, Tower
from clipdeploy.engines.passport import EnginePassport
from clipdeploy.runners import OnnxRunner, Runner, open_runner
from clipdeploy.verification.results import ArtifactEntry
from clipdeploy.workspace.folder import PRECISIONS, Workspace
from clipdeploy.workspace.passports import check_made_from, checked_passport, is_vouched
from exporters.headers import read_skeleton, weight_files
from exporters.products import find_products
from exporters.signature import classifier_signature, text_signature

__all__ = ["Target", "digest_of_artifact", "named_targets", "open_target", "workspace_targets"]


@dataclass(frozen=True)
class Target:
    """An artifact to judge; an engine names the graph it was compiled from.

    ``vouched`` is False for a file without a passport: ``passport`` is then the reference's, with
    the file's own input and output.
    """

    path: Path
    kind: Literal["graph", "engine"]
    passport: Passport
    graph: Path | None = None

    vouched: bool = True

    @property
    def precision(self) -> Precision:
        """The artifact's precision."""
        return self.passport.precision


def _graphs(workspace: Workspace, model: str, tower: Tower) -> Iterator[Target]:
    _, reference = workspace.source(model, tower)
    for precision in (*PRECISIONS, "int8-cpu"):
        graph = workspace.graph(model, precision, tower)
        if graph.exists():
            yield Target(graph, "graph", checked_passport(graph, reference, tower=tower).graph)


def _engines(workspace: Workspace, model: str, tower: Tower) -> Iterator[Target]:
    _, reference = workspace.source(model, tower)
    for precision in PRECISIONS:
        graph = workspace.graph(model, precision, tower)
        engine = workspace.engine(model, precision, tower)
        if not engine.exists():
            continue
        found = checked_passport(engine, reference, tower=tower).engine
        assert found is not None
        check_made_from(engine, found.hashes.graph, graph)
        yield Target(engine, "engine", found.graph, graph)


def workspace_targets(
    workspace: Workspace, model: str, *, graphs_only: bool, tower: Tower = "image"
) -> list[Target]:
    """Return every graph of a model's ``tower`` and, unless ``graphs_only``, every engine.

    Raises:
        UsageError: the tower has not been exported.
        ArtifactError, GraphError, FileError: an artifact is damaged, was not made from its source,
            or does not match its passport, see :mod:`clipdeploy.workspace.passports`.
    """
    found = list(_graphs(workspace, model, tower))
    return found if graphs_only else [*found, *_engines(workspace, model, tower)]


def named_targets(paths: Sequence[Path], reference: Passport, *, trust: bool) -> list[Target]:
    """Return the named files after a check against the reference.

    Raises:
        UsageError: a file is neither ``.onnx`` nor ``.engine``, or is named twice.
        ArtifactError, GraphError, FileError: a file is not of the reference, does not match its
            passport, see :mod:`clipdeploy.workspace.passports`, or cannot be read.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("an artifact is named twice", hint="name each one once")
    return [_named(path, paths, reference, trust=trust) for path in paths]


def _named(path: Path, paths: Sequence[Path], reference: Passport, *, trust: bool) -> Target:
    if path.suffix not in (".onnx", ".engine"):
        raise UsageError(f"{path} is neither .onnx nor .engine", hint="name a graph or an engine")
    # A damaged or newer passport is refused below; only a file without one is accepted here.
    if not is_vouched(path):
        if path.suffix == ".onnx":
            return _foreign_graph(path, reference)
        if trust:
            return Target(path, "engine", reference, vouched=False)
    checked = checked_passport(path, reference, tower=reference.tower)
    if checked.engine is None:
        return Target(path, "graph", checked.graph)
    return Target(path, "engine", checked.graph, _scored_graph(path, checked.engine, paths))


def _scored_graph(engine: Path, passport: EnginePassport, paths: Sequence[Path]) -> Path | None:
    """Return the graph that an engine was compiled from, if it is among ``paths``."""
    graph = engine.with_suffix(".onnx")
    scored = graph in paths and passport.hashes.graph == sha256_file(graph)
    return graph if scored else None


def _foreign_graph(path: Path, reference: Passport) -> Target:
    if reference.tower == "text":
        image, logits = text_signature(path, CONTEXT, reference.classes)
    else:
        image, logits = classifier_signature(path, reference.preprocess.size, reference.classes)
    foreign = replace(reference, precision=_precision(path), input=image, output=logits)
    return Target(path, "graph", foreign, vouched=False)


def _precision(path: Path) -> Precision:
    """Return the precision of most matrix products; FP32 if none has a known precision."""
    products = [product.precision for product in find_products(read_skeleton(path))]
    known: tuple[Precision, ...] = ("int8", "fp8", "fp16", "fp32")
    return max(known, key=products.count) if set(known) & set(products) else "fp32"


def digest_of_artifact(path: Path) -> str:
    """Return the SHA-256 of a file, or of all digests of a graph and its external weight files."""
    hashes = [sha256_file(path)]
    if path.suffix == ".onnx":
        hashes += [sha256_file(file) for file in weight_files(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def open_target(
    target: Target, *, trust: bool = False, threads: int = 0
) -> tuple[Runner | None, ArtifactEntry]:
    """Return a runner of the artifact, None if nothing can run it, and its entry in the run key.

    float16 is computed as stored if no GPU computes it, see :class:`OnnxRunner`. ``threads`` is the
    number of CPU threads of a graph, 0 for ONNX Runtime's default.

    Raises:
        GraphError, FileError: a graph cannot be loaded.
    """
    entry = ArtifactEntry(
        artifact=str(target.path),
        kind=target.kind,
        precision=target.precision,
        sha256=digest_of_artifact(target.path),
        runner="",
        vouched=target.vouched,
    )
    foreign = None if target.vouched else target.passport
    try:
        runner = open_runner(
            target.path, threads=threads, trust=trust, as_stored=True, passport=foreign
        )
    except EngineError as error:
        graph = f"; {target.graph.name} was scored instead" if target.graph else ""
        return None, replace(entry, why_not=f"{error.message}{graph}")
    why_not = runner.emulation if isinstance(runner, OnnxRunner) else ""
    entry = replace(entry, runner=runner.name, emulated=bool(why_not), why_not=why_not)
    return runner, entry
