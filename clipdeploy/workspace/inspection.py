"""Inspects a file: its passport, its size, and the precision of each block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, EngineError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Passport, WeightsOrigin
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
from clipdeploy.workspace.proof import ReferenceProof, reference_proof
from exporters.blocks import BlockPrecision
from exporters.headers import check_weights, read_passport, read_skeleton
from exporters.products import requested_precision

__all__ = ["Inspection", "inspect_file", "inspection_table"]


@dataclass(frozen=True)
class Inspection(Shown):
    """The facts of a graph or an engine.

    ``passport`` is that of the graph and ``engine`` that of the engine, None for a file without
    one. ``asked`` is the precision in the graph, ``compiled`` the precision that the compiler
    reported, ``executed`` the precision that the engine itself reports, None if it could not be
    queried, for the reason in ``note``. ``fallbacks`` are the blocks whose ``executed`` (or else
    ``compiled``) precision differs from ``asked``. ``reference`` says how the graph's reference was
    proven, None for a file without a passport.
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
    reference: ReferenceProof | None = None

    def __rich__(self) -> Renderable:
        return inspection_table(self)


def inspect_file(path: StrPath, *, trust: bool = False) -> Inspection:
    """Inspect an ``.onnx`` or ``.engine`` file.

    Raises:
        FileError, GraphError, ArtifactError: it cannot be read or does not match its passport.
        UsageError: neither ``.onnx`` nor ``.engine``.
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
        check_weights(path)
    except ArtifactError as error:
        passport, note = None, error.message
    return Inspection(
        path,
        path.stat().st_size,
        sha256_file(path),
        passport,
        None,
        len(skeleton.graph.node),
        requested_precision(skeleton),
        None,
        None,
        note,
        reference=reference_proof(path, passport) if passport else None,
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
    reference = reference_proof(path, graph) if graph else None
    return Inspection(path, size, digest, graph, engine, None, *words, note, fallbacks, reference)


def _ask_engine(path: Path, *, trust: bool) -> tuple[ExecutedPrecision | None, str]:
    # PyTorch allocates an engine's memory, and is slow to import: only if the engine can run.
    from clipdeploy.engines.preflight import preflight

    try:
        plan = preflight(path, trust=trust)
        from clipdeploy.runners.engine import layer_information

        return executed_precision(parse_engine_information(layer_information(plan))), ""
    except EngineError as error:
        return None, f"the engine was not queried: {error.message}"


_ROLES = ("checkpoint", "source_graph", "calibration", "graph", "timing_cache", "plan")


def _weights(origin: WeightsOrigin) -> str:
    if origin.kind == "random":
        return f"random, seed {origin.seed}: no accuracy"
    return f"{origin.path}, {origin.layout}"


def _graph_facts(passport: Passport) -> list[tuple[str, str]]:
    spec, preprocess = passport.input, passport.preprocess
    shape = " x ".join(str(axis) for axis in spec.shape)
    return [
        ("model", f"{passport.model}, {passport.precision}"),
        ("weights", _weights(passport.weights)),
        ("recipe", f"numerics {passport.recipe.numerics}, resize {passport.recipe.resize}"),
        ("input", f"{spec.name}: {spec.dtype} {shape}"),
        (
            "images",
            f"{preprocess.size} px, mean {_rgb(preprocess.mean)}, std {_rgb(preprocess.std)}",
        ),
        ("output", f"{passport.output.name}: {passport.output.dtype}, {_width(passport)}"),
    ]


def _width(passport: Passport) -> str:
    return f"{passport.classes} {'numbers' if passport.embeds else 'classes'}"


def _rgb(values: tuple[float, float, float]) -> str:
    return " ".join(f"{value:.4f}" for value in values)


def _engine_facts(engine: EnginePassport) -> list[tuple[str, str]]:
    profiles = "; ".join(
        f"{low} to {high}, tuned for {best}" for low, best, high in engine.profiles
    )
    facts = [
        ("compiled by", f"{engine.backend} {engine.backend_version}, {engine.build_seconds:.1f} s"),
        ("for", f"{engine.built_on}; {engine.platform}"),
        ("batches", profiles),
    ]
    if engine.driver:
        facts.append(("driver", f"{engine.driver}, CUDA {engine.cuda}"))
    chosen = [
        f"{name.replace('_', ' ')} {', '.join(value) if isinstance(value, list) else value}"
        for name, value in engine.settings.items()
        if value and value != "none" and name != "profiles"
    ]
    return [*facts, ("settings", "; ".join(chosen))] if chosen else facts


def _hashes(result: Inspection) -> list[tuple[str, str]]:
    if result.engine is not None:
        hashes = result.engine.hashes
        named = [(role, getattr(hashes, role)) for role in _ROLES]
    else:
        parents = result.passport.parents if result.passport else {}
        checkpoint = result.passport.weights.sha256 if result.passport else ""
        named = [("checkpoint", checkpoint), *parents.items(), ("graph", result.sha256)]
    return [(role.replace("_", " "), digest[:16]) for role, digest in named if digest]


def _findings(result: Inspection) -> tuple[str, ...]:
    return result.passport.calibration_findings if result.passport else ()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "-"


def _merged(blocks: tuple[BlockPrecision, ...]) -> list[tuple[str, BlockPrecision]]:
    """Merge neighbours with the same precision into one row: ``blocks.0 to 11``."""
    rows: list[tuple[str, BlockPrecision]] = []
    for block in blocks:
        if rows and (block.gemms, block.attention) == (rows[-1][1].gemms, rows[-1][1].attention):
            first = rows[-1][0].partition(" to ")[0]
            rows[-1] = (f"{first} to {block.block.rpartition('.')[2]}", rows[-1][1])
        else:
            rows.append((block.block, block))
    return rows


def inspection_table(result: Inspection) -> Group:
    """Return the file's facts, the precision of each block, and the source of that precision."""
    nodes = f", {result.nodes} nodes" if result.nodes is not None else ""
    known = [("file", f"{result.path}: {result.bytes / 1e6:.1f} MB{nodes}")]
    known += _graph_facts(result.passport) if result.passport else []
    known += [("reference", result.reference.sentence)] if result.reference else []
    known += [("calibration", text) for text in _findings(result)]
    known += _engine_facts(result.engine) if result.engine else []
    hashes = _hashes(result)
    wide = max((len(role) for role, _ in hashes), default=0)
    known.append(("SHA-256", "\n".join(f"{role:{wide}}  {digest}" for role, digest in hashes)))
    table = Table(box=None, pad_edge=False)
    for title in ("block", "matrix products", "attention"):
        table.add_column(title, no_wrap=True)
    reported = result.executed or result.compiled
    for name, block in _merged(reported.blocks if reported else result.asked):
        table.add_row(name, _counts(block.gemms), _counts(block.attention))
    return Group(facts(known), Text(""), table, Text(""), *_sources(result))


def _sources(result: Inspection) -> list[Text]:
    """Return where the precisions come from, what is unknown, and which blocks differ."""
    if result.executed is not None:
        source = f"as reported by the engine; {result.executed.reformats} reformats"
    elif result.compiled is not None:
        source = (
            f"as reported by the compiler, {result.compiled.reformats} reformats; "
            "not confirmed by the engine"
        )
    else:
        source = "as written in the graph"
        source += "; not confirmed by the engine" if result.engine else ""
    reported = result.executed or result.compiled
    lines = [Text(source), *([Text(result.note)] if result.note else [])]
    lines += [Text(f"  unknown: {text}") for text in (reported.unknown if reported else ())]
    lines += [Text(f"  NOT AS REQUESTED: {text}", style="red") for text in result.fallbacks]
    unchecked = result.engine.unchecked if result.engine else ()
    return lines + [Text(f"  {text}", style="red") for text in unchecked]
