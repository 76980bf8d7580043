"""Checks that an engine can run on this machine, before TensorRT loads it.

An engine file can contain anything, so only bytes with the hash in the passport reach TensorRT.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.device import Gpu, gpus
from clipdeploy.core.errors import EngineError
from clipdeploy.core.files import read_regular
from clipdeploy.engines.backends import is_installed, release_of, tensorrt_module
from clipdeploy.engines.passport import (
    EnginePassport,
    check_plan,
    passport_path,
    platform_name,
    read_engine_passport,
)

__all__ = ["Host", "Plan", "check_machine", "preflight", "read_host", "runs_on"]


@dataclass(frozen=True)
class Plan:
    """An engine's bytes, their SHA-256 in hex, and its passport.

    ``passport`` is None only for a trusted engine that has none.
    """

    path: Path
    data: bytes
    sha256: str
    passport: EnginePassport | None


@dataclass(frozen=True)
class Host:
    """The machine to run an engine on; ``version`` is that of the engine's backend."""

    platform: str
    gpu: Gpu | None
    version: str | None


def read_host(passport: EnginePassport) -> Host:
    """Describe the machine that this process runs on."""
    backend = passport.backend
    version = str(tensorrt_module(backend).__version__) if is_installed(backend) else None
    devices = gpus()
    return Host(platform_name(), devices[0] if devices else None, version)


def runs_on(passport: EnginePassport, gpu: Gpu) -> bool:
    """Whether the engine is built for the compute capability of ``gpu``."""
    if passport.hardware == "ampere-plus":
        return gpu.compute_capability >= (8, 0)
    return gpu.capability in passport.capabilities


def _same_version(passport: EnginePassport, version: str) -> bool:
    built, found = release_of(passport.backend_version), release_of(version)
    if not passport.settings.get("version_compatible"):
        return built == found
    # Runs on newer versions of the same major (NVIDIA's developer guide, "Version Compatibility").
    (major, minor), other = _numbers(built), _numbers(found)
    return other[0] == major and other[1] >= minor


def _numbers(version: str) -> tuple[int, int]:
    """The major and minor number of a version; -1 for one that it lacks."""
    numbers = [int(number) for number in re.findall(r"\d+", version)]
    major, minor, *_ = *numbers, -1, -1
    return major, minor


def _no_gpu() -> EngineError:
    return EngineError("no GPU on this machine", hint="run it on the machine that will serve")


def check_machine(engine: Path, passport: EnginePassport, host: Host) -> None:
    """Check that the engine can run on the machine ``host``.

    Raises:
        EngineError: the platform, TensorRT version or compute capability differs, or no GPU.
    """
    again = f"build it again here: {passport.rebuild}"
    if passport.platform != host.platform:
        raise EngineError(
            f"{engine} was built for {passport.platform}, this machine is {host.platform}",
            hint=again,
        )
    if host.gpu is None:
        raise _no_gpu()
    built = f"{passport.backend} {passport.backend_version}"
    if host.version is None:
        package = passport.backend
        raise EngineError(
            f"{engine} was built by {built}, which is not installed",
            hint=f"pip install {package}=={passport.backend_version}",
        )
    if not _same_version(passport, host.version):
        raise EngineError(f"{engine} was built by {built}, installed is {host.version}", hint=again)
    if not runs_on(passport, host.gpu):
        raise EngineError(
            f"{engine} runs on SM {', '.join(passport.capabilities)}; "
            f"{host.gpu.name} is {host.gpu.sm}",
            hint=again,
        )


def preflight(engine: Path, *, trust: bool = False, host: Host | None = None) -> Plan:
    """Read an engine and check that it can be loaded on this machine.

    The file is read once, so the returned bytes are the hashed bytes.  ``trust`` does not
    compare the hash, and checks nothing if there is no passport.

    Raises:
        FileError: the engine cannot be read.
        ArtifactError: no passport, one of a newer clipdeploy, or one of another file.
        EngineError: the engine cannot run here; see :func:`check_machine`.
    """
    data = read_regular(engine)
    digest = hashlib.sha256(data).hexdigest()
    if trust and not passport_path(engine).exists():
        if not gpus():
            raise _no_gpu()
        return Plan(engine, data, digest, None)
    passport = read_engine_passport(engine)
    if not trust:
        check_plan(engine, passport, len(data), digest)
    check_machine(engine, passport, host or read_host(passport))
    return Plan(engine, data, digest, passport)
