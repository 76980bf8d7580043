"""Build options of an engine, and the check that a backend supports them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from packaging.version import Version

from clipdeploy.core.device import gpus
from clipdeploy.core.errors import BuildError, UsageError
from clipdeploy.core.spans import BATCH, MEMORY_MIB, OPTIMIZATION, check_numbers, shown
from clipdeploy.engines.backends import (
    Backend,
    BackendOption,
    check_versions,
    compute_capabilities,
    targets_capabilities,
)
from clipdeploy.engines.passport import BatchProfile

__all__ = ["BuildConfig", "Hardware", "check_options"]

Hardware = Literal["none", "ampere-plus", "same-capability"]
# From this release on BuilderFlag.REFIT may drop the bias of a GEMM, even if nothing is refitted
# (NVIDIA TensorRT 11.3.0, "Refitting an Engine"); no later release is known to be repaired.
# REFIT_IDENTICAL has no such defect, but only takes the same weights again: of no use here.
_DROPS_BIASES = Version("11.3")


@dataclass(frozen=True)
class BuildConfig:
    """Options that determine the engine that a graph is compiled to.

    ``profiles`` are (smallest, optimal, largest) batch sizes; a graph of one fixed batch size
    ignores them and has one profile of that size.  ``memory_pool_mib`` limits the scratch memory
    of a layer, in MiB.  ``compute_capability`` lists the targets of TensorRT-RTX, such as
    ("8.9",); empty means Ampere and newer.  ``hardware_compatible`` and ``version_compatible`` let
    a TensorRT engine run on other GPUs and on newer TensorRT versions.  ``strip_weights`` leaves
    the weights out of the plan; they are refitted from the graph when the engine is loaded.
    ``refittable`` allows other weights to be loaded later.

    Raises:
        UsageError: a profile is out of order, or a number or a compute capability is invalid.
    """

    backend: BackendOption = "auto"
    profiles: tuple[BatchProfile, ...] = ((1, 8, 32),)
    memory_pool_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: bool = True
    version_compatible: bool = False
    hardware_compatible: Hardware = "none"
    strip_weights: bool = False
    refittable: bool = False
    compute_capability: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.profiles:
            raise UsageError("no batch profile", hint="--profile 1,8,32")
        for profile in self.profiles:
            _check_profile(profile)
        check_numbers(
            self, memory_pool_mib=MEMORY_MIB.or_none, optimization_level=OPTIMIZATION.or_none
        )
        for capability in self.compute_capability:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise UsageError(
                    f"{capability!r} is not a compute capability", hint="write it like 8.9"
                )


def _check_profile(profile: BatchProfile) -> None:
    """Check that 1 <= smallest <= optimal <= largest batch, each within the limits.

    Raises:
        UsageError: the profile is out of order, or a batch is out of range.
    """
    for batch in profile:
        # A batch below 1 is reported as out of order, which is the clearer message.
        BATCH.check(max(1, batch) if isinstance(batch, int) else batch, "a batch of a profile")
    if len(profile) != 3 or [1, *profile] != sorted([1, *profile]):
        listed = ", ".join(map(shown, profile))
        raise UsageError(
            f"the batch profile {listed} is not in order",
            hint="1 <= --min-batch <= --opt-batch <= --max-batch",
        )


def check_options(backend: Backend, trt: ModuleType, config: BuildConfig) -> None:
    """Check that ``backend`` supports every option, before anything is built.

    Raises:
        BuildError: an option is not supported, or the backend is too old; the hint names an
            alternative.
    """
    check_versions(backend, trt)
    if targets_capabilities(trt):
        _check_portable(backend, compute_capabilities(trt), config)
    elif config.compute_capability:
        here = gpus()[0].sm if gpus() else "none found"
        raise BuildError(
            f"{backend} builds for the local GPU ({here}) and has no --compute-capability",
            hint="leave it out, add --hardware-compatible ampere-plus, or use --backend "
            "tensorrt-rtx",
        )
    elif config.refittable and Version(trt.__version__) >= _DROPS_BIASES:
        raise BuildError(
            f"--refittable is not safe with {backend} {trt.__version__}: the engine may compute a "
            "matrix product without its bias",
            hint=f'leave it out, or pip install "{backend}<{_DROPS_BIASES}"',
        )


def _check_portable(backend: Backend, known: tuple[str, ...], config: BuildConfig) -> None:
    """Check the options against a backend that builds for compute capabilities."""
    for capability in config.compute_capability:
        if capability not in known:
            raise BuildError(
                f"{backend} cannot build for compute capability {capability}, only for "
                f"{', '.join(known)}",
                hint="choose one of these, or use --backend tensorrt on that GPU",
            )
    if config.hardware_compatible != "none":
        raise BuildError(
            f"{backend} has no --hardware-compatible: its engines run on every compute "
            f"capability that they are built for, of {', '.join(known)}",
            hint="leave it out, or choose targets with --compute-capability",
        )
    if config.version_compatible:
        raise BuildError(
            f"{backend} has no --version-compatible: it has no lean runtime",
            hint="leave it out and build again after an upgrade (takes seconds), or use "
            "--backend tensorrt",
        )
    if config.optimization_level is not None:
        # Levels 0 and 5 gave byte-identical engines (1.7.1).
        raise BuildError(
            f"{backend} has no --optimization-level: it chooses kernels at load time",
            hint="leave it out, or use --backend tensorrt",
        )
