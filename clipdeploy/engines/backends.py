"""Chooses the TensorRT backend, reports what it can do and captures its messages.

Capabilities are probed on the imported module.  A version number only says which releases are too
old, and which have a defect that cannot be probed.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, TypeVar

from packaging.version import Version

from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import BuildError
from clipdeploy.core.passport import ScaleForm

__all__ = [
    "OLDEST",
    "Backend",
    "BackendChoice",
    "BackendOption",
    "CapturedLog",
    "capture_log",
    "check_versions",
    "choose_backend",
    "compiles_kernels_at_run_time",
    "compute_capabilities",
    "created",
    "default_capabilities",
    "is_installed",
    "machine_name",
    "release_of",
    "scale_forms",
    "targets_capabilities",
    "tensorrt_module",
]

T = TypeVar("T")
Backend = Literal["tensorrt", "tensorrt-rtx"]
BackendOption = Literal["auto", "tensorrt", "tensorrt-rtx"]
_MODULES: dict[Backend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# The oldest releases that work, by package, as in setup.cfg.  TensorRT-RTX 1.4.0.76 cannot build
# INT8 graphs without a GPU, and Polygraphy 0.49.26 cannot build any with TensorRT-RTX.
OLDEST = {"tensorrt": "10.12", "tensorrt-rtx": "1.5", "polygraphy": "0.50.3"}
_LOGGER = "Polygraphy"
# The logging level that Polygraphy gives to TensorRT's VERBOSE messages.
_VERBOSE = 6
# Members of ILogger.Severity below WARNING.
_BELOW_WARNING = {"INFO", "VERBOSE"}


@dataclass(frozen=True)
class CapturedLog:
    """The messages of a build or a load, in order; ``messages`` includes the ``errors``."""

    messages: list[str]
    errors: list[str]

    def reason(self, error: Exception | None = None) -> str:
        """The first line of the first error, or else of ``error``."""
        lines = (self.errors[0] if self.errors else str(error or "")).strip().splitlines()
        return lines[0] if lines else "no reason given"


@dataclass(frozen=True)
class BackendChoice:
    """A TensorRT backend and the reason why it was chosen, in a few words."""

    backend: Backend
    reason: str


# TensorRT-RTX multiplies a GEMM's int32 sums by one scale only: calibration/write.py.
_SCALE_FORMS: dict[Backend, tuple[ScaleForm, ...]] = {
    "tensorrt": ("channel", "tensor"),
    "tensorrt-rtx": ("ratio", "tensor"),
}


def scale_forms(backend: Backend) -> tuple[ScaleForm, ...]:
    """The forms of weight scales that ``backend`` computes 8-bit products with correctly and fast.

    The first has a scale for each output channel.
    """
    return _SCALE_FORMS[backend]


def is_installed(backend: Backend) -> bool:
    """Whether the backend can be imported; type stubs alone do not count."""
    spec = importlib.util.find_spec(_MODULES[backend])
    return spec is not None and spec.origin is not None


def choose_backend(requested: BackendOption) -> BackendChoice:
    """Choose the TensorRT backend to build with.

    ``auto`` chooses TensorRT if it is installed and the machine has a GPU, and otherwise
    TensorRT-RTX, which builds without a GPU.

    Raises:
        BuildError: the backend is not installed, or it needs a GPU and there is none.
    """
    if requested != "auto":
        _check_usable(requested)
        return BackendChoice(requested, "requested")
    if not is_installed("tensorrt"):
        choice = BackendChoice("tensorrt-rtx", "tensorrt is not installed")
    elif not gpus():
        choice = BackendChoice("tensorrt-rtx", "no GPU found, and it builds without one")
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
    """Configure Polygraphy for ``backend`` and import the backend's module.

    Polygraphy chooses between TensorRT and TensorRT-RTX when its TensorRT modules are imported, so
    a process can use only one of them.  The messages of Polygraphy and TensorRT go to Python's
    ``Polygraphy`` logger instead of stdout.

    Raises:
        BuildError: this process already uses the other backend.
    """
    import polygraphy.config
    from polygraphy.logger import G_LOGGER

    rtx = backend == "tensorrt-rtx"
    imported = "polygraphy.backend.trt" in sys.modules
    if imported and rtx != polygraphy.config.USE_TENSORRT_RTX:
        raise BuildError(
            f"{backend} cannot be loaded: this process already uses the other TensorRT backend",
            hint="start a new process",
        )
    polygraphy.config.USE_TENSORRT_RTX = rtx
    logger = logging.getLogger(_LOGGER)
    if not logger.handlers:
        # Without any handler Python would print warnings.
        logger.addHandler(logging.NullHandler())
    G_LOGGER.use_python_logging_system = True
    G_LOGGER.colors = G_LOGGER.letter = False
    G_LOGGER.module_severity = G_LOGGER.WARNING
    return importlib.import_module(_MODULES[backend])


def check_versions(backend: Backend, trt: ModuleType) -> None:
    """Check that ``backend``, imported as ``trt``, and Polygraphy are not too old.

    Raises:
        BuildError: one is older than its version in :data:`OLDEST`.
    """
    import polygraphy

    for package, version in ((backend, trt.__version__), ("polygraphy", polygraphy.__version__)):
        if Version(version) < Version(OLDEST[package]):
            raise BuildError(
                f"{package} {version} is too old: clipdeploy needs {OLDEST[package]} or newer",
                hint=f'pip install "{package}>={OLDEST[package]}"',
            )


def release_of(version: str) -> str:
    """The release of TensorRT in a version: ``10.13.3.9`` of ``10.13.3.9.post1``.

    A post-release is another Python package of the same library (PyPA, "Version specifiers").
    """
    return re.sub(r"\.post\d+$", "", version)


def created(make: Callable[[], T | None]) -> T | None:
    """What ``make`` creates with TensorRT; None if TensorRT creates nothing.

    If the driver is too old or memory is missing, TensorRT's methods return None, and its
    constructors raise the ``TypeError`` with which pybind11 reports a null pointer.
    """
    try:
        return make()
    except TypeError as error:
        if "returned nullptr" not in str(error):
            raise
        return None


def machine_name(backend: Backend, version: str, gpu: Gpu) -> str:
    """A file name for what depends on the backend's version and the GPU, such as a cache."""
    return f"{backend}-{version}-sm{gpu.capability}-{re.sub(r'[^A-Za-z0-9.-]+', '-', gpu.name)}"


def compiles_kernels_at_run_time(trt: ModuleType) -> bool:
    """Whether the backend compiles an engine's kernels when it runs, and can cache them."""
    return hasattr(trt, "IRuntimeCache")


def targets_capabilities(trt: ModuleType) -> bool:
    """Whether the backend builds for a list of compute capabilities, not for the local GPU."""
    return hasattr(trt, "ComputeCapability")


def compute_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """The compute capabilities that the backend can target, such as ("7.5", "8.0", "12.0")."""
    members = trt.ComputeCapability.__members__
    digits = sorted(int(name[2:]) for name in members if name.startswith("SM"))
    return tuple(f"{number // 10}.{number % 10}" for number in digits)


def default_capabilities(trt: ModuleType) -> tuple[str, ...]:
    """The default targets: Ampere and newer.

    Turing (7.5) makes the plan larger and has to be requested (NVIDIA, "CPU-Only AOT and
    TensorRT-RTX Engines").
    """
    return tuple(name for name in compute_capabilities(trt) if float(name) >= 8.0)


class _CaptureHandler(logging.Handler):
    def __init__(self, captured: CapturedLog) -> None:
        super().__init__(_VERBOSE)
        self._captured = captured

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self._captured.messages.append(message)
        if record.levelno >= logging.ERROR:
            self._captured.errors.append(message)


@contextmanager
def _direct_capture(captured: CapturedLog) -> Iterator[None]:
    """Capture INFO and VERBOSE messages directly in TensorRT's logger.

    A build of ViT-B logs about 10,000 lines.  Through the loggers of Polygraphy and Python they
    would take a tenth of its CPU time; warnings and errors still go through those loggers.
    """
    from polygraphy.backend.trt import get_trt_logger

    # TensorRT has one logger per process, so a second one could not replace Polygraphy's.
    logger = get_trt_logger()
    forward = logger.log

    def log(severity: Any, message: str) -> None:
        if severity.name in _BELOW_WARNING:
            captured.messages.append(message)
        else:
            forward(severity, message)

    logger.log = log
    try:
        yield
    finally:
        vars(logger).pop("log", None)


@contextmanager
def capture_log() -> Iterator[CapturedLog]:
    """Capture the messages of TensorRT and Polygraphy, down to VERBOSE, while the block runs."""
    from polygraphy.logger import G_LOGGER

    captured = CapturedLog([], [])
    handler, logger = _CaptureHandler(captured), logging.getLogger(_LOGGER)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(_VERBOSE)
    try:
        with _direct_capture(captured), G_LOGGER.verbosity(G_LOGGER.EXTRA_VERBOSE):
            yield captured
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
