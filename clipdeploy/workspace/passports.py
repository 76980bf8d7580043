"""Reads an artifact's passport and compares it with everything else that is known of the artifact.

A passport describes an artifact, and anyone can edit it: reordered class names, another mean or
another crop change the answers of the same weights. So each statement is compared with every other
source:

    card          preprocessing of its recipe, class names
    reference     model, weights, recipe, preprocessing, classes: all that an artifact must share
    file          input, output, precision, LayerNorm's eps, the mean and std inside a graph
    neighbours    the FP32 graph in the same folder; the graph that an engine was compiled from
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import (
    CONTEXT,
    LOGIT_SCALE_KEY,
    TOKENIZER_KEY,
    Passport,
    Precision,
    Task,
    Tower,
    WeightsOrigin,
    settings_of,
)
from clipdeploy.engines.passport import (
    EnginePassport,
    load_engine_passport,
    passport_path,
    read_engine_passport,
)
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.workspace.names import artifact_path
from exporters.headers import check_weights, has_passport, read_passport

__all__ = ["CheckedPassport", "check_made_from", "checked_passport", "is_vouched"]

# Fields in which artifacts of one reference may differ. The first four are compared with the file,
# the parents with the files' hashes; the last three record how and by which version it was made.
_VARIES = ("kind", "precision", "input", "output", "parents", "settings", "versions", "schema")
# Fields of an engine's passport, and the build option of each.
_BUILD_OPTIONS = {
    "profiles": "profiles",
    "hardware": "hardware_compatible",
    "capabilities": "compute_capability",
}
_IMAGE_TYPES = ("float32", "float16", "uint8")
_TOKEN_TYPES = ("int32", "int64")
_LOGIT_TYPES = ("float32", "float16")
_EPS_ROUNDING = 1e-6
_SHOWN = 60


@dataclass(frozen=True)
class CheckedPassport:
    """An artifact's passport after all comparisons; ``engine`` is None for a graph."""

    graph: Passport
    engine: EnginePassport | None = None


def is_vouched(path: Path) -> bool:
    """Return whether an ``.onnx`` or ``.engine`` file has a passport, readable or not.

    Raises:
        FileError, GraphError: a graph cannot be read.
    """
    return passport_path(path).exists() if path.suffix == ".engine" else has_passport(path)


def checked_passport(
    path: Path,
    reference: Passport | None = None,
    *,
    model: str | None = None,
    plan: bool = True,
    neighbours: bool = True,
    tower: Tower = "image",
) -> CheckedPassport:
    """Return the passport of a graph or an engine after comparing it with all other sources.

    ``reference`` is the passport of the FP32 graph that judges the artifact, None if there is none.
    ``model`` is the name of the card that it must have, any if None. ``plan`` compares an engine's
    bytes with their hash, ``neighbours`` compares files in the same folder.  ``tower`` is what the
    artifact must be: a text tower takes no images.

    Raises:
        FileError, GraphError: the file cannot be read, or is not a classifier of that size.
        ArtifactError: the passport is missing, unreadable, or contradicts the card, the reference,
            the file itself or the file that it was made from.
        UsageError: neither ``.onnx`` nor ``.engine``.
    """
    if path.suffix == ".onnx":
        passport = read_passport(path)
        _check_tower(path, passport, tower)
        _check_model(path, passport, model)
        _check_statements(path, passport, reference, neighbours=neighbours)
        check_weights(path)
        _check_file(path, passport)
        return CheckedPassport(passport)
    if path.suffix == ".engine":
        engine = load_engine_passport(path) if plan else read_engine_passport(path)
        _check_tower(path, engine.graph, tower)
        _check_model(path, engine.graph, model)
        _check_engine(path, engine)
        if neighbours:
            _check_compiled_graph(path, engine, reference)
        _check_statements(path, engine.graph, reference, neighbours=neighbours)
        return CheckedPassport(engine.graph, engine)
    raise UsageError(f"{path} is neither .onnx nor .engine", hint="name a graph or an engine")


def check_made_from(path: Path, found: str | None, parent: Path) -> None:
    """Compare the parent's hash in an artifact's passport with the file ``parent``.

    Raises:
        ArtifactError: there is no such file, or its hash differs.
        FileError: it cannot be read.
    """
    if not parent.exists() or found != sha256_file(parent):
        raise ArtifactError(
            f"{path} was not made from the {parent.name} in the same folder",
            hint="build it again with build-engine, or move it to another folder",
        )
    check_weights(parent)


# --- differences


def _difference(found: Any, wanted: Any, name: str = "") -> tuple[str, str, str] | None:
    """Return the first field in which two values differ: its name and both values, shortened."""
    if found == wanted:
        return None
    pairs: list[tuple[str, Any, Any]] = []
    if is_dataclass(found) and type(found) is type(wanted):
        pairs = [
            (
                f"{name}.{each.name}".strip("."),
                getattr(found, each.name),
                getattr(wanted, each.name),
            )
            for each in fields(found)
        ]
    elif isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        pairs = [(f"{name}.{key}".strip("."), found.get(key), wanted.get(key)) for key in keys]
    elif isinstance(found, tuple | list) and type(found) is type(wanted):
        if len(found) != len(wanted):
            return name, f"{len(found)} entries", f"{len(wanted)}"
        pairs = [
            (f"{name}[{index}]", *both)
            for index, both in enumerate(zip(found, wanted, strict=True))
        ]
    differences = (_difference(mine, theirs, field) for field, mine, theirs in pairs)
    return next(filter(None, differences), None) or (name, _shown(found), _shown(wanted))


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) and value else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse_difference(
    path: Path, found: Any, wanted: Any, name: str, source: str, hint: str
) -> None:
    difference = _difference(found, wanted, name)
    if difference is not None:
        field, mine, theirs = difference
        raise ArtifactError(
            f"the passport of {path} does not match {source}: {field} is {mine}, not {theirs}",
            hint=hint,
        )


def _remake_hint(model: str, precision: Precision, tower: Tower = "image") -> str:
    """Return the hint for making a graph of ``model`` again."""
    commands: dict[Precision, str] = {
        "fp32": f"export --model {model}",
        "fp16": f"build-engine --model {model} --fp16",
        "int8": f"quantize --model {model}",
        "int8-cpu": f"quantize --model {model} --cpu",
        "fp8": f"quantize --model {model} --fp8",
    }
    text = " --text-tower" if tower == "text" else ""
    return (
        "make it again with the same options: "
        f"clipdeploy {commands[precision]}{text} --force; or pass the right --model"
    )


# --- the passport, the card and the reference


def _decides(passport: Passport) -> dict[str, Any]:
    """Return all fields that artifacts of one reference share; new fields are included."""
    values = {
        each.name: getattr(passport, each.name)
        for each in fields(passport)
        if each.name not in _VARIES
    }
    # The path of the checkpoint does not matter.
    return values | {"weights": passport.weights.identity}


def _check_statements(
    path: Path, passport: Passport, reference: Passport | None, *, neighbours: bool
) -> None:
    folder, name, tower = path.parent, passport.model, passport.tower
    source = artifact_path(folder, name, "fp32", "onnx", tower)
    beside = neighbours and source.name != path.name and source.exists()
    if beside and path == artifact_path(folder, name, passport.precision, "onnx", tower):
        check_made_from(path, passport.parents.get("source_graph"), source)
    if reference is not None:
        _check_same(path, passport, reference, "the reference")
    _check_card(path, passport)
    _check_interface(path, passport)
    if beside:
        _check_same(path, passport, read_passport(source), f"{source.name} in the same folder")
        if tower == "text":
            _check_texts(path, passport, read_passport(source), source.name)
    image = artifact_path(folder, name, "fp32", "onnx")
    if neighbours and tower == "text" and image.exists():
        same = replace(read_passport(image), tower="text")
        _check_same(path, passport, same, f"{image.name} in the same folder")


def _check_texts(path: Path, passport: Passport, source: Passport, name: str) -> None:
    """Compare what the passports of a pair's texts record beside the weights."""
    hint = _remake_hint(passport.model, passport.precision, "text")
    for key in (LOGIT_SCALE_KEY, TOKENIZER_KEY):
        values = passport.settings.get(key), source.settings.get(key)
        _refuse_difference(path, *values, f"settings.{key}", f"{name} in the same folder", hint)


def _check_tower(path: Path, passport: Passport, tower: Tower) -> None:
    """Refuse a text tower where images are given, and the other way round."""
    if passport.tower != tower:
        found, wanted = (
            ("a text tower, which takes token ids, not images", "takes images")
            if tower == "image"
            else ("no text tower: it takes images", "is a text tower")
        )
        raise ArtifactError(f"{path} is {found}", hint=f"name a graph or an engine that {wanted}")


def _check_model(path: Path, passport: Passport, model: str | None) -> None:
    if model is not None:
        hint = _remake_hint(model, passport.precision, passport.tower)
        _refuse_difference(path, passport.model, model, "model", "the requested model", hint)


def _check_same(path: Path, passport: Passport, reference: Passport, source: str) -> None:
    hint = _remake_hint(reference.model, passport.precision, passport.tower)
    found, wanted = _decides(passport), _decides(reference)
    for name in found:
        _refuse_difference(path, found[name], wanted[name], name, source, hint)


def _check_card(path: Path, passport: Passport) -> None:
    card = cards.full_card(passport.model)
    if card is None:
        raise ArtifactError(
            f"the passport of {path} names the model {_shown(passport.model)}, and no card has "
            "that name",
            hint="it was edited or made by another version; `clipdeploy zoo` lists the models",
        )
    hint = _remake_hint(card.name, passport.precision, passport.tower)
    source = f"the card of {card.name}"
    expected = card.preprocess(passport.recipe)
    _refuse_difference(path, passport.preprocess, expected, "preprocess", source, hint)
    if not _is_whole(passport.weights):
        raise ArtifactError(
            f"the passport of {path} contradicts itself: weights of kind {passport.weights.kind}, "
            f"seed {passport.weights.seed}, sha256 {_shown(passport.weights.sha256)}",
            hint=hint,
        )
    task: Task = "classification" if card.embedding is None else "embedding"
    _refuse_difference(path, passport.task, task, "task", source, hint)
    names, own = passport.class_names, tuple(name for name, _ in cards.class_names(card))
    if passport.embeds:
        _refuse_difference(path, passport.classes, card.classes, "classes", source, hint)
        _refuse_difference(path, names, (), "class_names", source, hint)
        return
    if names and not len(set(names)) == len(names) == passport.classes:
        raise ArtifactError(
            f"the passport of {path} has {len(set(names))} different class_names for "
            f"{passport.classes} classes",
            hint=hint,
        )
    # A user's checkpoint may have as many classes, with other names or none. Names that are shared
    # with the card, and were not given by the user, are the card's list in another order.
    given = passport.class_names_from in ("file", "checkpoint")
    free = not is_published(card, passport.weights) and (given or not set(names) & set(own))
    if passport.classes == len(own) and not free:
        _refuse_difference(path, names, own, "class_names", source, hint)


def _is_whole(weights: WeightsOrigin) -> bool:
    """Return whether there is a checkpoint hash and no seed, or a seed and no hash."""
    if weights.kind == "random":
        return weights.seed is not None and not weights.sha256
    return weights.seed is None and len(weights.sha256) == 64


@cache
def _demo_weights() -> str:
    return sha256_file(cards.demo_file("weights.safetensors"))


def is_published(card: ModelCard, weights: WeightsOrigin) -> bool:
    """Return whether the classes of ``weights`` are known to be the card's."""
    if weights.kind == "random":
        return True
    prefix = _demo_weights() if card.name == cards.DEMO else card.sha256_prefix
    if prefix and weights.sha256.startswith(prefix):
        return True
    return card.is_downloaded(Path(weights.path))


def _check_interface(path: Path, passport: Passport) -> None:
    """Check that the input has the size of the crop and the output a logit per class."""
    hint = _remake_hint(passport.model, passport.precision, passport.tower)
    image, logits = passport.input, passport.output
    wanted, types = _wanted_input(passport)
    source = "its own preprocessing and classes"
    _refuse_difference(path, passport.kind, "graph", "kind", "the file type", hint)
    _refuse_difference(path, image.shape[1:], wanted, "input.shape[1:]", source, hint)
    _refuse_difference(
        path, logits.shape[1:], (passport.classes,), "output.shape[1:]", source, hint
    )
    _refuse_difference(
        path, logits.shape[:1], image.shape[:1], "output.shape[:1]", "its input", hint
    )
    for name, spec, kinds in (("input", image, types), ("output", logits, _LOGIT_TYPES)):
        if spec.dtype not in kinds:
            _refuse_difference(path, spec.dtype, " or ".join(kinds), f"{name}.dtype", source, hint)


def _wanted_input(passport: Passport) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The axes behind the batch that the input must have, and its possible types."""
    if passport.tower == "text":
        return (CONTEXT,), _TOKEN_TYPES
    size = passport.preprocess.size
    wanted = (size, size, 3) if passport.input.dtype == "uint8" else (3, size, size)
    return wanted, _IMAGE_TYPES


# --- the passport and the nodes of the graph


def _check_file(path: Path, passport: Passport) -> None:
    # onnx takes longer to import than everything above takes to run.
    from clipdeploy.workspace.graph_facts import graph_facts

    facts = graph_facts(path, passport)
    hint = _remake_hint(passport.model, passport.precision, passport.tower)
    source = "the graph itself"
    _refuse_difference(path, passport.input, facts.input, "input", source, hint)
    _refuse_difference(path, passport.output, facts.output, "output", source, hint)
    # A search may find that no Linear can be quantised, and records it in the settings.
    none = 0 in (passport.settings.get(f"{name}_nodes") for name in ("int8", "fp8"))
    empty = {"int8": "fp16", "fp8": "fp16", "int8-cpu": "fp32"} if none else {}
    if empty.get(passport.precision) != facts.precision:
        _refuse_difference(path, passport.precision, facts.precision, "precision", source, hint)
    # The weights' choices are those of the image tower.
    eps = passport.weights.choices.eps
    if passport.tower == "text":
        return
    if eps is not None and facts.eps is not None:
        # A file has it as float32.
        if abs(facts.eps - eps) > _EPS_ROUNDING * eps:
            _refuse_difference(path, eps, facts.eps, "weights.choices.eps", source, hint)
    elif facts.numerics is not None:
        found = passport.recipe.numerics
        _refuse_difference(path, found, facts.numerics, "recipe.numerics", source, hint)
    if not facts.normalisation_matches:
        raise ArtifactError(
            f"the passport of {path} does not match the graph itself: preprocess.mean or "
            "preprocess.std is not what normalises the graph's uint8 input",
            hint=hint,
        )


# --- engines


def _check_compiled_graph(path: Path, engine: EnginePassport, reference: Passport | None) -> None:
    """Check that the graph in the same folder is the engine's source and has the same passport."""
    graph = path.with_suffix(".onnx")
    if not graph.exists():
        return
    check_made_from(path, engine.hashes.graph, graph)
    own = checked_passport(graph, reference, tower=engine.graph.tower).graph
    hint = f"build it again: {engine.rebuild}"
    source = f"{graph.name}, which it was compiled from"
    _refuse_difference(path, engine.graph, own, "", source, hint)


def _check_engine(path: Path, engine: EnginePassport) -> None:
    """Check the fields that an engine's passport has twice."""
    hint, made = f"build it again: {engine.rebuild}", engine.graph
    ordered = (1 <= low <= best <= high for low, best, high in engine.profiles)
    if not engine.profiles or not all(ordered):
        raise ArtifactError(
            f"the passport of {path} has no batch profiles in order: {_shown(engine.profiles)}",
            hint=hint,
        )
    settings, hashes = engine.settings, engine.hashes
    pairs: list[tuple[str, Any, Any]] = [
        ("hashes.source_graph", hashes.source_graph, made.parents.get("source_graph")),
        ("hashes.calibration", hashes.calibration, made.parents.get("calibration")),
        ("hashes.checkpoint", hashes.checkpoint, made.weights.sha256 or None),
        ("plan_bytes", engine.plan_bytes, path.stat().st_size),
    ]
    for name, option in _BUILD_OPTIONS.items():
        # Without capabilities to build for, the compiler chose them.
        if option in settings and (settings[option] or name != "capabilities"):
            pairs.append((name, settings_of(getattr(engine, name)), settings[option]))
    for name, found, wanted in pairs:
        # Engines of older versions leave out some hashes.
        if found is not None:
            _refuse_difference(path, found, wanted, name, "its other fields", hint)
    if isinstance(batch := made.input.shape[0], int):
        only = ((batch, batch, batch),)
        _refuse_difference(path, engine.profiles, only, "profiles", "its graph", hint)
