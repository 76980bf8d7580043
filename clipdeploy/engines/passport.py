"""Reads, writes and checks an engine's passport, the file ``*.engine.json``.

The passport describes the engine, its graph and its build; ``docs/passport.md`` lists every field.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import read_regular, sha256_file, write_atomic
from clipdeploy.core.passport import Passport, from_json, to_json
from clipdeploy.core.values import (
    MOST_BATCH,
    Fault,
    is_hash,
    is_number,
    is_version,
    unless,
    unless_lines,
)
from clipdeploy.engines.backends import Backend
from clipdeploy.engines.inspector import ExecutedPrecision, differences
from exporters.blocks import BlockPrecision

__all__ = [
    "ENGINE_SCHEMA",
    "EnginePassport",
    "Hashes",
    "check_plan",
    "library_versions",
    "load_engine_passport",
    "passport_path",
    "platform_name",
    "read_engine_passport",
    "save_engine_passport",
]

ENGINE_SCHEMA = 3
# The last schema in which the field ``unknown`` of ``compiled`` was named ``untold``.
_SCHEMA_WITH_UNTOLD = 2
_LIBRARIES = (
    "torch",
    "onnx",
    "onnx-ir",
    "onnxruntime-gpu",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
    "polygraphy",
    "numpy",
)

BatchProfile = tuple[int, int, int]
# Far above any real value: 30 days, and 256 batch profiles.
_MOST_SECONDS = 30 * 24 * 3600
# Most kernels of a block in INT8 or FP8 whose attention is FP16 or one fused kernel; with INT8
# attention that is not fused it has 15 (scripts/bench/precisions.py).
_MOST_FUSED = 10
_MOST_PROFILES = 256


@dataclass(frozen=True)
class Hashes:
    """SHA-256 hashes, in hex, of an engine and of the files it was made from.

    ``checkpoint`` is None for random weights, ``source_graph`` (the FP32 graph) for an FP32
    engine, ``calibration`` unless the engine is INT8, and ``timing_cache`` if none was used.
    """

    plan: str
    graph: str
    source_graph: str | None = None
    calibration: str | None = None
    checkpoint: str | None = None
    timing_cache: str | None = None

    def faults(self) -> Iterator[Fault]:
        """Yield the fields that are not valid hashes; see :mod:`clipdeploy.core.values`."""
        for each in fields(self):
            digest = getattr(self, each.name)
            valid = digest is None or is_hash(digest)
            yield from unless(valid, each.name, digest, "a SHA-256 in hex")


@dataclass(frozen=True)
class EnginePassport:
    """The passport of an engine.

    ``graph`` is the passport of the compiled graph: model, weights, recipe, input and output, class
    names, precision.  ``profiles`` are (min, opt, max) batch sizes.  ``capabilities`` are the
    compute capabilities that the engine runs on, such as ("8.9",), and ``hardware`` the
    compatibility level beyond them.  ``gpu`` and ``driver`` are None if the engine was built
    without a GPU.  ``asked`` lists the precisions that the graph requests, per block; ``compiled``
    those in the build log, None if it lists no layers.  ``kernels`` counts the kernels of each
    block in the plan for its first profile; it is empty if the plan does not list them.
    ``checked_products`` is the number of 8-bit products with a weight that were found in the plan
    and do not overflow.
    """

    graph: Passport
    hashes: Hashes
    plan_bytes: int
    build_seconds: float
    backend: Backend
    backend_version: str
    profiles: tuple[BatchProfile, ...]
    capabilities: tuple[str, ...]
    hardware: str
    platform: str
    gpu: str | None = None
    driver: str | None = None
    cuda: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    asked: tuple[BlockPrecision, ...] = ()
    compiled: ExecutedPrecision | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    checked_products: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = ENGINE_SCHEMA

    def faults(self) -> Iterator[Fault]:
        """Yield the fields with invalid values; see :mod:`clipdeploy.core.values`."""
        version = is_version(self.backend_version)
        yield from unless(version, "backend_version", self.backend_version, "a version's number")
        yield from unless(self.plan_bytes >= 0, "plan_bytes", self.plan_bytes, "0 or more")
        valid = is_number(self.build_seconds, 0, _MOST_SECONDS)
        yield from unless(valid, "build_seconds", self.build_seconds, f"from 0 to {_MOST_SECONDS}")
        few = len(self.profiles) <= _MOST_PROFILES
        yield from unless(few, "profiles", len(self.profiles), f"{_MOST_PROFILES} at most")
        for index, profile in enumerate(self.profiles):
            valid = all(1 <= batch <= MOST_BATCH for batch in profile)
            expected = f"batches from 1 to {MOST_BATCH}"
            yield from unless(valid, f"profiles[{index}]", profile, expected)
        for index, capability in enumerate(self.capabilities):
            valid = is_version(capability)
            yield from unless(valid, f"capabilities[{index}]", capability, "such as 8.9")
        for name in ("hardware", "platform", "gpu", "driver", "cuda", "settings", "versions"):
            yield from unless_lines(name, getattr(self, name))

    @property
    def built_on(self) -> str:
        """The GPU that the engine was built on, if any, and the targets that it runs on."""
        targets = "SM " + ", ".join(self.capabilities)
        return f"{self.gpu}, {targets}" if self.gpu else f"built without a GPU, for {targets}"

    @property
    def batches(self) -> tuple[int, int]:
        """The smallest and the largest batch of any profile."""
        return min(low for low, _, _ in self.profiles), max(high for _, _, high in self.profiles)

    @property
    def has_weights(self) -> bool:
        """Whether the plan contains its weights; if not, they are refitted from the graph."""
        return not self.settings.get("strip_weights")

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """The blocks that were not compiled in the requested precision, one sentence each."""
        return differences(self.asked, self.compiled) if self.compiled else ()

    @property
    def unchecked(self) -> tuple[str, ...]:
        """A sentence if 8-bit products could not be checked for overflow, else nothing.

        Only TensorRT-RTX needs the check, see :mod:`clipdeploy.engines.plan_text`.
        """
        compiled = self.compiled.blocks if self.compiled else self.asked
        products = sum(block.gemms.get(name, 0) for block in compiled for name in ("int8", "fp8"))
        if self.backend != "tensorrt-rtx" or self.checked_products >= products:
            return ()
        found = f"{self.checked_products} of {products}"
        return (f"only {found} 8-bit products were checked for overflow in float16",)

    @property
    def unfused(self) -> tuple[str, ...]:
        """A sentence if TensorRT-RTX compiled INT8 attention to many kernels, else nothing."""
        counts = [
            self.kernels.get(each.block, 0) for each in self.asked if "int8" in each.attention
        ]
        many = [count for count in counts if count > _MOST_FUSED]
        if not many:
            return ()
        return (
            f"TensorRT-RTX did not fuse the INT8 attention of {len(many)} blocks, which have up to "
            f"{max(many)} kernels each instead of {_MOST_FUSED} or fewer: leave out "
            "--quantize-attention, or use --fp8",
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What differs from the request, and what was not checked, one sentence each."""
        fallbacks = (f"not compiled as requested: {text}" for text in self.fallbacks)
        return (*fallbacks, *self.unfused, *self.unchecked)

    @property
    def rebuild(self) -> str:
        """The command that rebuilds this engine."""
        graph = self.graph
        text = "--text-tower " if graph.tower == "text" else ""
        return f"clipdeploy build-engine --model {graph.model} {text}--{graph.precision} --force"


def passport_path(engine: Path) -> Path:
    """The path of an engine's passport."""
    return engine.with_name(engine.name + ".json")


def save_engine_passport(passport: EnginePassport, engine: Path) -> None:
    """Write the passport next to its engine.

    Raises:
        FileError: no permission or no disk space.
    """
    write_atomic(passport_path(engine), to_json(passport))


def read_engine_passport(engine: Path) -> EnginePassport:
    """Read the passport of an engine without reading the engine.

    Raises:
        ArtifactError: the passport is missing, unreadable, or of a newer clipdeploy.
    """
    path = passport_path(engine)
    if not path.exists():
        raise ArtifactError(
            f"{engine} has no passport ({path.name})",
            hint="build it again with clipdeploy build-engine",
        )
    data = read_regular(path)
    return from_json(data, EnginePassport, str(path), ENGINE_SCHEMA, _with_new_names)


def _with_new_names(raw: Any) -> Any:
    """The decoded JSON of an older schema with the names of this one."""
    if isinstance(raw, dict) and raw.get("schema") == _SCHEMA_WITH_UNTOLD:
        compiled = raw.get("compiled")
        if isinstance(compiled, dict) and "untold" in compiled:
            compiled["unknown"] = compiled.pop("untold")
    return raw


def check_plan(engine: Path, passport: EnginePassport, found_bytes: int, found_hash: str) -> None:
    """Compare the size and hash of an engine file with its passport.

    Raises:
        ArtifactError: the hash differs; the message says whether the file was cut short.
    """
    if found_hash == passport.hashes.plan:
        return
    expected = passport.plan_bytes
    what = (
        f"it has {found_bytes:,} of {expected:,} bytes, it was cut short"
        if found_bytes < expected
        else "it was changed or replaced"
    )
    raise ArtifactError(
        f"{engine} is not the file that its passport describes: {what}",
        hint=f"build it again: {passport.rebuild}",
    )


def load_engine_passport(engine: Path) -> EnginePassport:
    """Read the passport of an engine and compare it with the engine's bytes.

    Raises:
        FileError: the engine cannot be read.
        ArtifactError: the passport is missing, unreadable, or of another file.
    """
    passport = read_engine_passport(engine)
    digest = sha256_file(engine)
    check_plan(engine, passport, engine.stat().st_size, digest)
    return passport


def library_versions() -> dict[str, str]:
    """The versions of Python, clipdeploy and the libraries that affect results, by name."""
    from clipdeploy.core.version import __version__

    versions = {"clipdeploy": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def platform_name() -> str:
    """The operating system and processor that an engine needs, such as ``linux x86_64``."""
    return f"{sys.platform} {platform.machine()}"
