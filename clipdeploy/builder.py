"""Compile an ONNX graph to a TensorRT engine: strongly typed, through Polygraphy.

The graph decides every precision; the builder only compiles.  That is the one way that TensorRT
10.12 to 11.x and TensorRT-RTX have in common: 11 removed the FP16 and INT8 builder flags.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from clipdeploy.device import gpus
from clipdeploy.passport import (
    EnginePassport,
    load_engine_passport,
    passport_path,
    platform_name,
    save_engine_passport,
)
from exporters.errors import ArtifactError, BuildError, UsageError
from exporters.files import file_errors, sha256_file, write_atomic
from exporters.graphs import read_passport
from exporters.progress import SILENT, Progress

__all__ = ["Backend", "BuildConfig", "EngineArtifact", "build_engine", "choose_backend"]

Backend = Literal["tensorrt", "tensorrt-rtx"]
_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


@dataclass(frozen=True)
class BuildConfig:
    """``profile`` is the (smallest, optimal, largest) batch that the engine takes.

    A graph that was exported for one batch size has that one, whatever ``profile`` says.
    """

    backend: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    profile: tuple[int, int, int] = (1, 8, 32)

    def __post_init__(self) -> None:
        low, best, high = self.profile
        if not 1 <= low <= best <= high:
            raise UsageError(
                f"the batch profile {low}, {best}, {high} is not in order",
                hint="1 <= --min-batch <= --opt-batch <= --max-batch",
            )


@dataclass(frozen=True)
class EngineArtifact:
    """An engine file and its passport; ``changed`` is False if it was already there."""

    path: Path
    passport: EnginePassport
    changed: bool


def _installed(backend: Backend) -> bool:
    return importlib.util.find_spec(_MODULES[backend]) is not None


def choose_backend(wanted: Literal["auto", "tensorrt", "tensorrt-rtx"]) -> Backend:
    """The TensorRT flavour to build with.

    ``auto`` takes TensorRT where it is installed and a GPU is there to build on, else
    TensorRT-RTX, which builds without one.

    Raises:
        BuildError: that flavour, or any, is not installed.
    """
    if wanted == "auto":
        if _installed("tensorrt") and gpus():
            return "tensorrt"
        wanted = "tensorrt-rtx"
    if not _installed(wanted):
        package = _MODULES[wanted].replace("_", "-")
        raise BuildError(f"{package} is not installed", hint=f"pip install {package}")
    if wanted == "tensorrt" and not gpus():
        raise BuildError(
            "TensorRT builds only on a machine with a GPU",
            hint="pass --backend tensorrt-rtx, which builds without one",
        )
    return wanted


def tensorrt_module(backend: Backend) -> ModuleType:
    """Point Polygraphy at ``backend`` and import the module behind it.

    Polygraphy decides between TensorRT and TensorRT-RTX when its TensorRT modules are imported,
    so one process can use one flavour.

    Raises:
        BuildError: this process already uses the other flavour.
    """
    import polygraphy.config
    from polygraphy.logger import G_LOGGER

    rtx = backend == "tensorrt-rtx"
    imported = "polygraphy.backend.trt" in sys.modules
    if imported and rtx != polygraphy.config.USE_TENSORRT_RTX:
        raise BuildError(
            f"this process already uses another TensorRT than {backend}",
            hint="start a new one",
        )
    polygraphy.config.USE_TENSORRT_RTX = rtx
    G_LOGGER.module_severity = G_LOGGER.CRITICAL
    return importlib.import_module(_MODULES[backend])


def _compile(graph: Path, backend: Backend, shape: tuple[int, ...], config: BuildConfig) -> Any:
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        Profile,
    )
    from polygraphy.exception import PolygraphyException

    low, best, high = ((batch, *shape) for batch in config.profile)
    profile = Profile().add("image", min=low, opt=best, max=high)
    if backend == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create_config = CreateConfigRTX(profiles=[profile])
    else:
        create_config = CreateConfig(profiles=[profile])
    network = NetworkFromOnnxPath(str(graph), strongly_typed=True)
    try:
        return EngineBytesFromNetwork(network, config=create_config)()
    except PolygraphyException as error:
        reason = str(error).strip().splitlines()[0]
        raise BuildError(
            f"{backend} cannot compile {graph}: {reason}",
            hint="see TensorRT's own messages with --debug",
        ) from error


def _unchanged(
    engine: Path, graph_hash: str, backend: Backend, version: str, config: BuildConfig
) -> EngineArtifact | None:
    if not engine.exists() or not passport_path(engine).exists():
        return None
    try:
        passport = load_engine_passport(engine)
    except ArtifactError:
        return None
    wanted = (graph_hash, backend, version, config.profile)
    found = (passport.graph_sha256, passport.backend, passport.backend_version, passport.profile)
    return EngineArtifact(engine, passport, changed=False) if found == wanted else None


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
        BuildError: no TensorRT, or TensorRT refuses the graph.
        ArtifactError, FileError: the graph cannot be used, or the engine not written.
    """
    passport = read_passport(graph)
    batch = passport.input.shape[0]
    if isinstance(batch, int):
        config = replace(config, profile=(batch, batch, batch))
    backend = choose_backend(config.backend)
    graph_hash = sha256_file(graph)
    version = str(tensorrt_module(backend).__version__)
    if not force and (found := _unchanged(engine, graph_hash, backend, version, config)):
        return found
    shape = tuple(axis for axis in passport.input.shape[1:] if isinstance(axis, int))
    started = time.perf_counter()
    with progress.task(f"build the {passport.precision} engine with {backend} {version}"):
        plan = bytes(_compile(graph, backend, shape, config))
    seconds = time.perf_counter() - started
    device = gpus()
    # The passport goes first: an engine without one is never believed, and a passport without its
    # engine vouches for nothing.
    with file_errors("replace", passport_path(engine)):
        passport_path(engine).unlink(missing_ok=True)
    write_atomic(engine, plan)
    result = EnginePassport(
        graph=passport,
        graph_sha256=graph_hash,
        plan_sha256=sha256_file(engine),
        plan_bytes=len(plan),
        build_seconds=round(seconds, 3),
        backend=backend,
        backend_version=version,
        profile=config.profile,
        built_on=f"{device[0].name}, {device[0].sm}" if device else "a machine without a GPU",
        platform=platform_name(),
    )
    save_engine_passport(result, engine)
    return EngineArtifact(engine, result, changed=True)
