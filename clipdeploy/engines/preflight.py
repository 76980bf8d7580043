"""Whether an engine may be loaded here, told before CUDA would say it in its own words.

An engine file can carry anything: only bytes that a passport vouches for are handed to TensorRT.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import EngineError
from clipdeploy.core.files import read_regular
from clipdeploy.engines.backends import is_installed, tensorrt_module
from clipdeploy.engines.passport import (
    EnginePassport,
    check_plan,
    passport_path,
    platform_name,
    read_engine_passport,
)

__all__ = ["Plan", "ThisMachine", "check_machine", "preflight", "this_machine"]


@dataclass(frozen=True)
class Plan:
    """An engine's bytes, and the passport that vouches for them; None only where it was waived."""

    path: Path
    data: bytes
    passport: EnginePassport | None


@dataclass(frozen=True)
class ThisMachine:
    """What an engine is held against; ``version`` is that of the engine's own flavour."""

    platform: str
    gpu: Gpu | None
    version: str | None


def this_machine(passport: EnginePassport) -> ThisMachine:
    """The machine that this process runs on."""
    backend = passport.backend
    version = str(tensorrt_module(backend).__version__) if is_installed(backend) else None
    devices = gpus()
    return ThisMachine(platform_name(), devices[0] if devices else None, version)


def _runs_on(passport: EnginePassport, gpu: Gpu) -> bool:
    if passport.hardware == "ampere-plus":
        return gpu.compute_capability >= (8, 0)
    return gpu.capability in passport.capabilities


def _same_version(passport: EnginePassport, version: str) -> bool:
    if not passport.settings.get("version_compatible"):
        return passport.backend_version == version
    # NVIDIA's developer guide, "Version Compatibility": within a major version, to newer ones.
    built, here = passport.backend_version.split("."), version.split(".")
    return built[0] == here[0] and [int(p) for p in built[1:2]] <= [int(p) for p in here[1:2]]


def check_machine(engine: Path, passport: EnginePassport, here: ThisMachine) -> None:
    """Hold what an engine is bound to against ``here``.

    Raises:
        EngineError: another platform, no GPU, another TensorRT, another compute capability.
    """
    again = f"build it again here: {passport.rebuild}"
    if passport.platform != here.platform:
        raise EngineError(
            f"{engine} was built for {passport.platform}, this is {here.platform}", hint=again
        )
    if here.gpu is None:
        raise EngineError("no GPU on this machine", hint="run it where the engine will serve")
    built = f"{passport.backend} {passport.backend_version}"
    if here.version is None:
        package = passport.backend
        raise EngineError(
            f"{engine} was built by {built}, which is not installed here",
            hint=f"pip install {package}=={passport.backend_version}",
        )
    if not _same_version(passport, here.version):
        raise EngineError(f"{engine} was built by {built}, here is {here.version}", hint=again)
    if not _runs_on(passport, here.gpu):
        raise EngineError(
            f"{engine} runs on SM {', '.join(passport.capabilities)}; "
            f"{here.gpu.name} is {here.gpu.sm}",
            hint=again,
        )


def preflight(engine: Path, *, trust: bool = False, here: ThisMachine | None = None) -> Plan:
    """Read an engine that may be loaded on this machine.

    The bytes that were hashed are the bytes that are returned: the file is read once.  ``trust``
    waives the passport's hash, and everything else where there is no passport at all.

    Raises:
        FileError: the engine cannot be read.
        ArtifactError: no passport, one of a newer clipdeploy, or one of other bytes.
        EngineError: an engine of another machine; see :func:`check_machine`.
    """
    data = read_regular(engine)
    if trust and not passport_path(engine).exists():
        if not gpus():
            raise EngineError("no GPU on this machine", hint="run it where the engine will serve")
        return Plan(engine, data, None)
    passport = read_engine_passport(engine)
    if not trust:
        check_plan(engine, passport, len(data), hashlib.sha256(data).hexdigest())
    check_machine(engine, passport, here or this_machine(passport))
    return Plan(engine, data, passport)
