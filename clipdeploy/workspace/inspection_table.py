"""An inspection as terminal tables."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from clipdeploy.core.display import facts
from clipdeploy.core.passport import Passport, WeightsOrigin
from clipdeploy.engines.passport import EnginePassport
from clipdeploy.workspace.inspection import Inspection
from exporters.blocks import BlockPrecision

__all__ = ["inspection_table"]

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
        ("output", f"{passport.output.name}: {passport.output.dtype}, {passport.classes} classes"),
    ]


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
        named = [
            (role, getattr(hashes, role))
            for role in (
                "checkpoint",
                "source_graph",
                "calibration",
                "graph",
                "timing_cache",
                "plan",
            )
        ]
    else:
        parents = result.passport.parents if result.passport else {}
        checkpoint = result.passport.weights.sha256 if result.passport else ""
        named = [("checkpoint", checkpoint), *parents.items(), ("graph", result.sha256)]
    return [(role.replace("_", " "), digest[:16]) for role, digest in named if digest]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "-"


def _merged(blocks: tuple[BlockPrecision, ...]) -> list[tuple[str, BlockPrecision]]:
    """Neighbours that ask for the same in one row: ``blocks.0 to 11``."""
    rows: list[tuple[str, BlockPrecision]] = []
    for block in blocks:
        if rows and (block.gemms, block.attention) == (rows[-1][1].gemms, rows[-1][1].attention):
            first = rows[-1][0].partition(" to ")[0]
            rows[-1] = (f"{first} to {block.block.rpartition('.')[2]}", rows[-1][1])
        else:
            rows.append((block.block, block))
    return rows


def inspection_table(result: Inspection) -> Group:
    """What the file is, then the precision of each block and whose word that is."""
    nodes = f", {result.nodes} nodes" if result.nodes is not None else ""
    known = [("file", f"{result.path}: {result.bytes / 1e6:.1f} MB{nodes}")]
    known += _graph_facts(result.passport) if result.passport else []
    known += _engine_facts(result.engine) if result.engine else []
    hashes = _hashes(result)
    wide = max((len(role) for role, _ in hashes), default=0)
    known.append(("SHA-256", "\n".join(f"{role:{wide}}  {digest}" for role, digest in hashes)))
    table = Table(box=None, pad_edge=False)
    for title in ("block", "matrix products", "attention"):
        table.add_column(title, no_wrap=True)
    told = result.executed or result.compiled
    for name, block in _merged(told.blocks if told else result.asked):
        table.add_row(name, _counts(block.gemms), _counts(block.attention))
    return Group(facts(known), Text(""), table, Text(""), *_words(result))


def _words(result: Inspection) -> list[Text]:
    """Whose word the precisions are, and what speaks against them."""
    if result.executed is not None:
        whose = f"the engine's own word; {result.executed.reformats} reformats"
    elif result.compiled is not None:
        whose = (
            "the compiler's word when it built the engine; "
            f"{result.compiled.reformats} reformats; not the engine's word"
        )
    else:
        whose = "what the graph asks for" + ("; not the engine's word" if result.engine else "")
    told = result.executed or result.compiled
    lines = [Text(whose), *([Text(result.note)] if result.note else [])]
    lines += [Text(f"  not told: {text}") for text in (told.untold if told else ())]
    return lines + [Text(f"  NOT AS ASKED: {text}", style="red") for text in result.fallbacks]
