"""Compile an ONNX graph to a TensorRT engine: strongly typed, through Polygraphy.

The graph decides every precision; the builder only compiles.  That is the one way that TensorRT
10.12 to 11.x and TensorRT-RTX have in common: 11 removed the FP16 and INT8 builder flags.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipdeploy.cache import cache_folder
from clipdeploy.device import driver, gpus
from clipdeploy.engines.backends import choose_backend, targets_capabilities, tensorrt_module
from clipdeploy.engines.build_config import BuildConfig, check_options
from clipdeploy.engines.build_monitor import PERCENT
from clipdeploy.engines.compiler import Compiler
from clipdeploy.engines.inspector import ExecutedPrecision, executed_precision, parse_build_log
from clipdeploy.engines.passport import (
    EnginePassport,
    Hashes,
    library_versions,
    load_engine_passport,
    passport_path,
    platform_name,
    save_engine_passport,
)
from clipdeploy.engines.plan_writer import PlanFile
from exporters.artifact import Passport, settings_of
from exporters.blocks import asked_precision, tensor_types
from exporters.errors import ArtifactError, EngineError, FileError
from exporters.files import atomic_path, file_errors, sha256_file
from exporters.headers import read_passport, read_skeleton
from exporters.notebook import Renderable, Shown, facts
from exporters.progress import SILENT, Progress

__all__ = ["EngineArtifact", "build_engine"]


@dataclass(frozen=True)
class EngineArtifact(Shown):
    """An engine file and its passport; ``changed`` is False if it was already there."""

    path: Path
    passport: EnginePassport
    changed: bool

    def __rich__(self) -> Renderable:
        made = self.passport
        profiles = (f"{low} to {high}, tuned for {best}" for low, best, high in made.profiles)
        rows = [
            ("engine", f"{self.path}: {made.plan_bytes / 1e6:.1f} MB"),
            ("model", f"{made.graph.model}, {made.graph.precision}"),
            ("compiled by", f"{made.backend} {made.backend_version}, {made.build_seconds:.1f} s"),
            ("for", made.built_on),
            ("batches", "; ".join(profiles)),
            ("made", "now" if self.changed else "before; nothing has changed since"),
        ]
        return facts([*rows, *(("NOT AS ASKED", text) for text in made.fallbacks)])


def _unchanged(engine: Path, wanted: EnginePassport) -> EnginePassport | None:
    """The passport of the engine that lies there, if all but its graph is as ``wanted``."""
    try:
        found = load_engine_passport(engine)
    except (ArtifactError, FileError):
        return None
    same = all(
        getattr(found, name) == getattr(wanted, name)
        for name in ("backend", "backend_version", "profiles", "capabilities", "settings")
    )
    return found if same else None


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What decides the engine: not who chose the flavour, nor how fast the build is."""
    settings = settings_of(config)
    return {name: settings[name] for name in settings if name not in ("backend", "timing_cache")}


def _draft(passport: Passport, compiler: Compiler, config: BuildConfig) -> EnginePassport:
    """The passport as far as it is known before the build."""
    device = gpus()
    targets = targets_capabilities(compiler.module)
    fp32 = passport.precision == "fp32"
    return EnginePassport(
        graph=passport,
        hashes=Hashes(
            plan="",
            graph="",
            source_graph=None if fp32 else passport.parents.get("source_graph"),
            calibration=passport.parents.get("calibration"),
            checkpoint=passport.weights.sha256 or None,
        ),
        plan_bytes=0,
        build_seconds=0.0,
        backend=compiler.backend,
        backend_version=compiler.version,
        profiles=config.profiles,
        capabilities=compiler.capabilities(config.compute_capability),
        hardware=config.hardware_compatible,
        platform=platform_name(),
        gpu=device[0].name if device and not targets else None,
        driver=getattr(driver(), "version", None),
        cuda=getattr(driver(), "cuda", None),
        settings=_settings(config),
        versions=library_versions(),
    )


def build_engine(
    graph: Path,
    engine: Path,
    config: BuildConfig = BuildConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
) -> EngineArtifact:
    """Compile ``graph`` to ``engine``, unless an engine of the same graph and settings is there.

    Raises:
        BuildError: no TensorRT, an option that it does not have, or it refuses the graph.
        ArtifactError, FileError: the graph cannot be used, or the engine not written.
    """
    passport = read_passport(graph)
    batch = passport.input.shape[0]
    if isinstance(batch, int):
        config = replace(config, profiles=((batch, batch, batch),))
    choice = choose_backend(config.backend)
    compiler = Compiler(choice.backend, tensorrt_module(choice.backend))
    check_options(choice.backend, compiler.module, config)
    wanted = _draft(passport, compiler, config)
    # Hashing takes as long as the disk and a core allow: it goes on beside the compiler.
    with ThreadPoolExecutor(1) as beside:
        graph_hash = beside.submit(sha256_file, graph)
        found = None if force else _unchanged(engine, wanted)
        if found is not None and found.hashes.graph == graph_hash.result():
            return EngineArtifact(engine, found, changed=False)
        compiler.check_flags(config)
        skeleton = read_skeleton(graph)
        compiler.check_types(tensor_types(skeleton), wanted.capabilities)
        cache = compiler.timing_cache(config, cache_folder())
        what = f"build the {passport.precision} engine with {choice.backend} {compiler.version}"
        started = time.perf_counter()
        with atomic_path(engine) as temporary:
            with (
                progress.task(f"{what} ({choice.reason})", PERCENT) as advance,
                PlanFile(temporary) as plan,
            ):
                log = compiler.compile(graph, passport.input, config, cache, plan.write, advance)
            seconds = time.perf_counter() - started
            # What the compiler said is read while the disk is waited for.
            compiled = beside.submit(_compiled_precision, log)
            # The old passport goes first: an engine without one is never believed.
            with file_errors("replace", passport_path(engine)):
                passport_path(engine).unlink(missing_ok=True)
        hashes = replace(
            wanted.hashes,
            plan=plan.sha256(),
            graph=graph_hash.result(),
            timing_cache=sha256_file(cache) if cache and cache.exists() else None,
        )
    made = replace(
        wanted,
        hashes=hashes,
        plan_bytes=plan.bytes,
        build_seconds=round(seconds, 3),
        asked=asked_precision(skeleton),
        compiled=compiled.result(),
    )
    save_engine_passport(made, engine)
    return EngineArtifact(engine, made, changed=True)


def _compiled_precision(log: tuple[str, ...]) -> ExecutedPrecision | None:
    """What the compiler lists of the layers that it made; None where it lists none."""
    try:
        return executed_precision(parse_build_log("\n".join(log)))
    except EngineError:
        return None
