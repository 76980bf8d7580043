"""What a file is: its passport, its size, and the precision of each block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.display import Renderable, Shown
from clipdeploy.core.errors import ArtifactError, EngineError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport
from clipdeploy.core.paths import StrPath
from clipdeploy.engines.inspector import (
    ExecutedPrecision,
    differences,
    executed_precision,
    parse_engine_information,
)
from clipdeploy.engines.passport import (
    EnginePassport,
    check_plan,
    passport_path,
    read_engine_passport,
)
from exporters.blocks import BlockPrecision
from exporters.headers import read_passport, read_skeleton
from exporters.products import asked_precision

__all__ = ["Inspection", "inspect_file"]


@dataclass(frozen=True)
class Inspection(Shown):
    """A graph or an engine.

    ``passport`` is that of the graph, ``engine`` that of the engine, None where nothing vouches
    for the file.  ``asked`` is what the graph asks for, ``compiled`` what the compiler said that it
    made of it, ``executed`` what the engine says of itself, None where it could not be asked, for
    the reason in ``note``; ``fallbacks`` are the blocks where the best of these words differs from
    what was asked.
    """

    path: Path
    bytes: int
    sha256: str
    passport: Passport | None
    engine: EnginePassport | None
    nodes: int | None
    asked: tuple[BlockPrecision, ...]
    compiled: ExecutedPrecision | None
    executed: ExecutedPrecision | None
    note: str
    fallbacks: tuple[str, ...] = ()

    def __rich__(self) -> Renderable:
        from clipdeploy.workspace.inspection_table import inspection_table

        return inspection_table(self)


def inspect_file(path: StrPath, *, trust: bool = False) -> Inspection:
    """Look into an ``.onnx`` or ``.engine`` file.

    Raises:
        FileError, GraphError, ArtifactError: it cannot be read, or is not what its passport says.
        UsageError: another kind of file.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _graph(path)
    if path.suffix == ".engine":
        return _engine(path, trust=trust)
    raise UsageError(f"{path} is neither .onnx nor .engine", hint="name a graph or an engine")


def _graph(path: Path) -> Inspection:
    skeleton = read_skeleton(path)
    try:
        passport, note = read_passport(path), ""
    except ArtifactError as error:
        passport, note = None, error.message
    return Inspection(
        path,
        path.stat().st_size,
        sha256_file(path),
        passport,
        None,
        len(skeleton.graph.node),
        asked_precision(skeleton),
        None,
        None,
        note,
    )


def _engine(path: Path, *, trust: bool) -> Inspection:
    digest = sha256_file(path)
    size = path.stat().st_size
    engine = None
    if not trust or passport_path(path).exists():
        engine = read_engine_passport(path)
        if not trust:
            check_plan(path, engine, size, digest)
    executed, note = _ask_engine(path, trust=trust)
    graph = engine.graph if engine else None
    asked, compiled = (engine.asked, engine.compiled) if engine else ((), None)
    best = executed or compiled
    fallbacks = differences(asked, best) if asked and best else ()
    words = (asked, compiled, executed)
    return Inspection(path, size, digest, graph, engine, None, *words, note, fallbacks)


def _ask_engine(path: Path, *, trust: bool) -> tuple[ExecutedPrecision | None, str]:
    # PyTorch holds an engine's memory, and takes seconds to import: only where an engine can run.
    from clipdeploy.engines.preflight import preflight

    try:
        plan = preflight(path, trust=trust)
        from clipdeploy.runners.engine import layer_information

        return executed_precision(parse_engine_information(layer_information(plan))), ""
    except EngineError as error:
        return None, f"the engine was not asked: {error.message}"
