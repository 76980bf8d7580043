"""Compile an ONNX graph to a TensorRT engine: strongly typed, through Polygraphy.

The graph decides every precision; the builder only compiles.  That is the one way that TensorRT
10.12 to 11.x and TensorRT-RTX have in common: 11 removed the FP16 and INT8 builder flags.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipdeploy.core.cache import cache_folder
from clipdeploy.core.device import driver, gpus
from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, EngineError, FileError
from clipdeploy.core.files import atomic_path, file_errors, sha256_file
from clipdeploy.core.passport import Passport, settings_of
from clipdeploy.core.progress import SILENT, Progress
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
    read_engine_passport,
    save_engine_passport,
)
from clipdeploy.engines.plan_writer import PlanFile
from exporters.blocks import BlockPrecision
from exporters.headers import read_passport, read_skeleton

__all__ = ["EngineArtifact", "build_engine"]

# With the graph, all that decides what an engine is.
_DECIDES = ("backend", "backend_version", "profiles", "capabilities", "settings")

# Percents of a build, by when TensorRT-RTX has said most of what it has to say (tested).
_SILENT_FROM = 75


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
        found = read_engine_passport(engine)
        same = all(getattr(found, name) == getattr(wanted, name) for name in _DECIDES)
        return load_engine_passport(engine) if same else None
    except (ArtifactError, FileError):
        return None


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


@contextmanager
def _new_engine(engine: Path) -> Iterator[PlanFile]:
    """The file of a plan, which takes the place of an older engine once the block ends well."""
    with atomic_path(engine) as temporary:
        with temporary.open("r+b") as stream, ThreadPoolExecutor(2) as beside:
            yield PlanFile(stream, beside)
        # The old passport goes first: an engine without one is never believed.
        with file_errors("replace", passport_path(engine)):
            passport_path(engine).unlink(missing_ok=True)


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
    with ThreadPoolExecutor(1) as beside:
        graph_hash = beside.submit(sha256_file, graph)
        found = None if force else _unchanged(engine, wanted)
        if found is not None and found.hashes.graph == graph_hash.result():
            return EngineArtifact(engine, found, changed=False)
        compiler.check_flags(config)
        cache = compiler.timing_cache(config, cache_folder())
        what = f"build the {passport.precision} engine with {choice.backend} {compiler.version}"
        started = time.perf_counter()
        with _new_engine(engine) as plan:
            with progress.task(f"{what} ({choice.reason})", PERCENT) as advance:
                asked = _Later(beside, lambda: _asked(graph))
                log = compiler.compile(
                    *(graph, passport.input, config, cache), plan.write, asked.watching(advance)
                )
            # While the disk is waited for.
            compiled = beside.submit(_compiled_precision, log)
            plan_hash = plan.sha256()
        seconds = time.perf_counter() - started
        hashes = replace(
            wanted.hashes,
            plan=plan_hash,
            graph=graph_hash.result(),
            timing_cache=sha256_file(cache) if cache and cache.exists() else None,
        )
    made = replace(
        wanted,
        hashes=hashes,
        plan_bytes=plan.bytes,
        build_seconds=round(seconds, 3),
        asked=asked.result(),
        compiled=compiled.result(),
    )
    save_engine_passport(made, engine)
    return EngineArtifact(engine, made, changed=True)


class _Later:
    """Work that waits until TensorRT has little more to say.

    At the beginning it tells Python of every layer, and Python code beside it would hold it up by
    as long as it takes itself; then it compiles for a second or more, and is silent.
    """

    def __init__(
        self, beside: ThreadPoolExecutor, work: Callable[[], tuple[BlockPrecision, ...]]
    ) -> None:
        self._beside = beside
        self._work = work
        self._future: Future[tuple[BlockPrecision, ...]] | None = None
        self._percents = 0

    def watching(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """``advance``, which also starts the work when most percents are done."""

        def step(count: int) -> None:
            self._percents += count
            if self._future is None and self._percents >= _SILENT_FROM:
                self._future = self._beside.submit(self._work)
            advance(count)

        return step

    def result(self) -> tuple[BlockPrecision, ...]:
        """What the work returned or raised."""
        return self._work() if self._future is None else self._future.result()


def _asked(graph: Path) -> tuple[BlockPrecision, ...]:
    """What ``graph`` asks a compiler for."""
    # Here, since every build would wait for onnx.
    from exporters.products import requested_precision

    return requested_precision(read_skeleton(graph))


def _compiled_precision(log: tuple[str, ...]) -> ExecutedPrecision | None:
    """What the compiler lists of the layers that it made; None where it lists none."""
    try:
        return executed_precision(parse_build_log("\n".join(log)))
    except EngineError:
        return None
