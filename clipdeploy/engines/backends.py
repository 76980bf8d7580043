"""The two flavours of TensorRT: which one to use, and what each of them can do.

Capabilities are probed on the module itself, never concluded from a version number.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import BuildError
from clipdeploy.core.passport import ScaleForm

__all__ = [
    "Backend",
    "BackendChoice",
    "Heard",
    "Wanted",
    "choose_backend",
    "compute_capabilities",
    "default_capabilities",
    "hears",
    "is_installed",
    "scale_form",
    "targets_capabilities",
    "tensorrt_module",
]

Backend = Literal["tensorrt", "tensorrt-rtx"]
Wanted = Literal["auto", "tensorrt", "tensorrt-rtx"]
_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_LOGGER = "Polygraphy"
# The level of TensorRT's verbose messages once Polygraphy has handed them on.
_VERBOSE = 6
# ILogger.Severity, below a warning.
_SMALL_TALK = {"INFO", "VERBOSE"}


@dataclass(frozen=True)
class Heard:
    """The messages of a build or a load, in order; ``errors`` are also in ``log``."""

    log: list[str]
    errors: list[str]


@dataclass(frozen=True)
class BackendChoice:
    """A flavour, and in a few words why it was taken."""

    backend: Backend
    reason: str


# TensorRT-RTX multiplies a GEMM's int32 sums by one scale only: calibration/write.py.
_SCALE_FORMS: dict[Backend, ScaleForm] = {"tensorrt": "channel", "tensorrt-rtx": "ratio"}


def scale_form(backend: Backend) -> ScaleForm:
    """The form of the weight scales that ``backend`` computes INT8 with correctly and fast."""
    return _SCALE_FORMS[backend]


def is_installed(backend: Backend) -> bool:
    """Whether the flavour can be imported; type stubs alone cannot."""
    spec = importlib.util.find_spec(_MODULES[backend])
    return spec is not None and spec.origin is not None


def choose_backend(wanted: Wanted) -> BackendChoice:
    """The TensorRT flavour to build with.

    ``auto`` takes TensorRT where it is installed and a GPU is there to build on, else
    TensorRT-RTX, which builds without one.

    Raises:
        BuildError: that flavour, or any, is not installed, or needs a GPU that is not there.
    """
    if wanted != "auto":
        _check_usable(wanted)
        return BackendChoice(wanted, "asked for")
    if not is_installed("tensorrt"):
        choice = BackendChoice("tensorrt-rtx", "tensorrt is not installed")
    elif not gpus():
        choice = BackendChoice("tensorrt-rtx", "no GPU here, and it builds without one")
    else:
        choice = BackendChoice("tensorrt", f"for {gpus()[0].name}")
    _check_usable(choice.backend)
    return choice


def _check_usable(backend: Backend) -> None:
    if not is_installed(backend):
        package = _MODULES[backend].replace("_", "-")
        wanted = '"clipdeploy[tensorrt]"' if backend == "tensorrt" else package
        raise BuildError(f"{package} is not installed", hint=f"pip install {wanted}")
    if backend == "tensorrt" and not gpus():
        raise BuildError(
            "TensorRT builds only on a machine with a GPU",
            hint="pass --backend tensorrt-rtx, which builds without one",
        )


def tensorrt_module(backend: Backend) -> ModuleType:
    """Point Polygraphy at ``backend`` and import the module behind it.

    Polygraphy decides between TensorRT and TensorRT-RTX when its TensorRT modules are imported,
    so one process can use one flavour.  Its messages, TensorRT's among them, go to Python's
    ``Polygraphy`` logger instead of stdout.

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
    logger = logging.getLogger(_LOGGER)
    if not logger.handlers:
        # With no handler at all Python would print warnings.
        logger.addHandler(logging.NullHandler())
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.colors = G_LOGGER.letter = False
    G_LOGGER.module_severity = G_LOGGER.WARNING
    return importlib.import_module(_MODULES[backend])


def targets_capabilities(trt: ModuleType) -> bool:
    """Whether an engine is built for compute capabilities rather than for the GPU at hand."""
    return hasattr(trt, "ComputeCapability")


def compute_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """What :func:`targets_capabilities` can target, such as ("7.5", "8.0", "12.0")."""
    members = trt.ComputeCapability.__members__
    digits = sorted(int(name[2:]) for name in members if name.startswith("SM"))
    return tuple(f"{number // 10}.{number % 10}" for number in digits)


def default_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """What an engine is built for if nobody says: Ampere and newer.

    Turing (7.5) costs a larger plan and has to be asked for (NVIDIA, "CPU-Only AOT and
    TensorRT-RTX Engines").
    """
    return tuple(name for name in compute_capabilities(trt) if float(name) >= 8.0)


class _Ear(logging.Handler):
    def __init__(self, heard: Heard) -> None:
        super().__init__(_VERBOSE)
        self._heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._heard.log.append(message)
        if record.levelno >= logging.ERROR:
            self._heard.errors.append(message)


@contextmanager
def _short_way(heard: Heard) -> Iterator[None]:
    """Collect TensorRT's small talk where it arrives.

    A build of ViT-B says some 10,000 lines.  By way of Polygraphy's and Python's loggers they cost
    a tenth of its CPU time; warnings and errors still go that way.
    """
    from polygraphy.backend.trt import get_trt_logger

    # TensorRT keeps one logger a process, so a second one could not replace Polygraphy's.
    logger = get_trt_logger()
    long_way = logger.log

    def log(severity: Any, message: str) -> None:
        if severity.name in _SMALL_TALK:
            heard.log.append(message)
        else:
            long_way(severity, message)

    logger.log = log
    try:
        yield
    finally:
        vars(logger).pop("log", None)


@contextmanager
def hears() -> Iterator[Heard]:
    """Collect what TensorRT and Polygraphy say while the block runs, each layer of a build."""
    from polygraphy.logger import G_LOGGER

    heard = Heard([], [])
    ear, logger = _Ear(heard), logging.getLogger(_LOGGER)
    level = logger.level
    logger.addHandler(ear)
    logger.setLevel(_VERBOSE)
    try:
        with _short_way(heard), G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
            yield heard
    finally:
        logger.setLevel(level)
        logger.removeHandler(ear)
