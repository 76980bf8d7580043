"""Builds a strongly typed TensorRT engine from an ONNX graph, through Polygraphy.

The graph determines every precision.  This is the only method that TensorRT 10.12 to 11.x and
TensorRT-RTX share: version 11 removed the FP16 and INT8 builder flags.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from clipdeploy.core.cache import cache_folder
from clipdeploy.core.device import driver, gpus
from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import ArtifactError, BuildError, EngineError, FileError
from clipdeploy.core.files import atomic_path, file_errors, sha256_file
from clipdeploy.core.passport import QUANTISED, Passport, settings_of
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.backends import (
    Backend,
    choose_backend,
    scale_forms,
    targets_capabilities,
    tensorrt_module,
)
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
from clipdeploy.engines.plan_text import (
    PlanKernel,
    checked_products,
    kernels_by_block,
    overflowing,
    read_programs,
)
from clipdeploy.engines.plan_writer import PlanFile
from clipdeploy.engines.preflight import runs_on
from exporters.blocks import BlockPrecision
from exporters.headers import graph_sha256, read_passport, read_skeleton

__all__ = ["EngineArtifact", "build_engine"]

# The passport fields that, with the graph, determine the engine.
_DECIDES = ("backend", "backend_version", "profiles", "capabilities", "settings")

# TensorRT-RTX logs most of its messages before this percentage of a build (measured).
_QUIET_FROM = 75


@dataclass(frozen=True)
class EngineArtifact(Shown):
    """An engine file and its passport; ``changed`` is False if it already existed."""

    path: Path
    passport: EnginePassport
    changed: bool

    @property
    def remarks(self) -> tuple[str, ...]:
        """The passport's remarks, and one if the GPU of this machine cannot run the engine."""
        made = self.passport
        unfit = (
            f"{gpu.name} in this machine is {gpu.sm}, and cannot run an engine for SM "
            f"{', '.join(made.capabilities)}; for this machine, build it with "
            f"--compute-capability {gpu.capability} or --backend tensorrt"
            for gpu in gpus()[:1]
            if not runs_on(made, gpu)
        )
        return (*made.remarks, *unfit)

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
        return facts([*rows, *(("remark", text) for text in self.remarks)])


def _unchanged(engine: Path, draft: EnginePassport) -> EnginePassport | None:
    """The passport of the existing engine if it matches ``draft``, the graph's hash aside."""
    try:
        found = read_engine_passport(engine)
        same = all(getattr(found, name) == getattr(draft, name) for name in _DECIDES)
        return load_engine_passport(engine) if same else None
    except (ArtifactError, FileError):
        return None


def _settings(config: BuildConfig) -> dict[str, Any]:
    """The settings that determine the engine, without the chosen backend and the cache."""
    settings = settings_of(config)
    kept = {name: settings[name] for name in settings if name not in ("backend", "timing_cache")}
    # The compiler clears the flag.  Engines without this entry may compute in TF32.
    return {**kept, "tf32": False}


def _draft(passport: Passport, compiler: Compiler, config: BuildConfig) -> EnginePassport:
    """The passport without the fields that are only known after the build."""
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
    """Open a plan file that replaces an older engine when the block succeeds."""
    with atomic_path(engine) as temporary:
        with temporary.open("r+b") as stream, ThreadPoolExecutor(2) as pool:
            yield PlanFile(stream, pool)
        # The old passport is removed first, because an engine without one is never used.
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
    """Compile ``graph`` to ``engine``, unless ``engine`` has the same graph and settings.

    Raises:
        BuildError: TensorRT is not installed, lacks an option, or refuses the graph.
        ArtifactError, FileError: the graph cannot be used, or the engine cannot be written.
    """
    passport = read_passport(graph)
    batch = passport.input.shape[0]
    if isinstance(batch, int):
        config = replace(config, profiles=((batch, batch, batch),))
    choice = choose_backend(config.backend)
    _check_scales(graph, passport, choice.backend)
    compiler = Compiler(choice.backend, tensorrt_module(choice.backend))
    config = replace(config, compute_capability=compiler.targets(config, passport.precision))
    check_options(choice.backend, compiler.module, config)
    draft = _draft(passport, compiler, config)
    with ThreadPoolExecutor(1) as pool:
        graph_hash = pool.submit(graph_sha256, graph)
        found = None if force else _unchanged(engine, draft)
        if found is not None and found.hashes.graph == graph_hash.result():
            return EngineArtifact(engine, found, changed=False)
        compiler.check_flags(config)
        cache = compiler.timing_cache(config, cache_folder())
        what = f"build the {passport.precision} engine with {choice.backend} {compiler.version}"
        started = time.perf_counter()
        with _new_engine(engine) as plan:
            with progress.task(f"{what} ({choice.reason})", PERCENT) as advance:
                asked = _DeferredWork(pool, lambda: _asked(graph))
                log = compiler.compile(
                    *(graph, passport.input, config, cache), plan.write, asked.track(advance)
                )
            # This runs while the plan is synced to the disk.
            compiled = pool.submit(_compiled_precision, log)
            plan_hash = plan.sha256()
            programs = plan.read(read_programs)
            _check_sums(graph, programs)
        seconds = time.perf_counter() - started
        hashes = replace(
            draft.hashes,
            plan=plan_hash,
            graph=graph_hash.result(),
            timing_cache=sha256_file(cache) if cache and cache.exists() else None,
        )
    made = replace(
        draft,
        hashes=hashes,
        plan_bytes=plan.bytes,
        build_seconds=round(seconds, 3),
        asked=asked.result(),
        compiled=compiled.result(),
        kernels=kernels_by_block(programs[0] if programs else ()),
        checked_products=min(map(checked_products, programs), default=0),
    )
    save_engine_passport(made, engine)
    return EngineArtifact(engine, made, changed=True)


def _check_scales(graph: Path, passport: Passport, backend: Backend) -> None:
    """Refuse a quantised graph whose weight scales have the form for the other backend.

    Raises:
        BuildError: it names the command that writes the right one.
    """
    form, possible = passport.settings.get("weight_scales", "channel"), scale_forms(backend)
    fp8 = "--fp8 " if passport.precision == "fp8" else ""
    if passport.precision in QUANTISED and form not in possible:
        raise BuildError(
            f"{graph} has weight scales in {form} form, {backend} needs the {possible[0]} form",
            hint=f"clipdeploy quantize --model {passport.model} {fp8}--weight-scales {possible[0]}",
        )


def _check_sums(graph: Path, programs: tuple[tuple[PlanKernel, ...], ...]) -> None:
    """Refuse a plan whose 8-bit products overflow.

    Raises:
        BuildError: it names the first such product.
    """
    if found := overflowing(chain.from_iterable(programs)):
        name = found[0].rpartition("/")[0]
        raise BuildError(
            f"the engine of {graph} would overflow: {len(found)} 8-bit products, such as "
            f"{found[0]}, write their raw sums as float16",
            hint=f"leave it out with --exclude '{name}', or build --fp16",
        )


class _DeferredWork:
    """Work that starts in another thread once TensorRT logs few messages.

    At the start of a build TensorRT logs every layer, and its log callbacks compete for the GIL
    with other Python code.  Afterwards it compiles for a second or more without callbacks.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, work: Callable[[], tuple[BlockPrecision, ...]]
    ) -> None:
        self._pool = pool
        self._work = work
        self._future: Future[tuple[BlockPrecision, ...]] | None = None
        self._percents = 0

    def track(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Wrap ``advance`` so that the work starts at :data:`_QUIET_FROM` percent."""

        def step(count: int) -> None:
            self._percents += count
            if self._future is None and self._percents >= _QUIET_FROM:
                self._future = self._pool.submit(self._work)
            advance(count)

        return step

    def result(self) -> tuple[BlockPrecision, ...]:
        """Return what the work returned, or raise what it raised."""
        return self._work() if self._future is None else self._future.result()


def _asked(graph: Path) -> tuple[BlockPrecision, ...]:
    """The precisions that ``graph`` requests."""
    # Imported here, so that a build does not wait for onnx.
    from exporters.products import requested_precision

    return requested_precision(read_skeleton(graph))


def _compiled_precision(log: tuple[str, ...]) -> ExecutedPrecision | None:
    """The precisions of the layers in the build log; None if it lists no layers."""
    try:
        return executed_precision(parse_build_log("\n".join(log)))
    except EngineError:
        return None
