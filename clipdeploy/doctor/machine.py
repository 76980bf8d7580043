"""Collects the facts about a machine: libraries, GPUs, driver, disk space."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from clipdeploy.core.cache import cache_folder
from clipdeploy.core.device import Driver, Gpu, driver, gpus
from clipdeploy.doctor.probes import PROBES, Library, probe
from clipdeploy.engines.passport import platform_name

__all__ = ["Folder", "Library", "Machine", "this_machine"]


@dataclass(frozen=True)
class Folder:
    """A folder that clipdeploy writes to; ``problem`` is the reason why it cannot, or empty."""

    role: str
    path: Path
    free_bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """The facts that :func:`clipdeploy.doctor.diagnose` judges.

    ``packages`` maps the installed distributions to their versions; ``requirements`` are those of
    clipdeploy on this platform, such as ``numpy>=1.26``.  Each of the four libraries is None if it
    is not installed.  ``visible`` is CUDA_VISIBLE_DEVICES, None if it is not set.
    """

    python: tuple[int, int, int]
    platform: str
    packages: dict[str, str]
    requirements: tuple[str, ...]
    torch: Library | None
    onnxruntime: Library | None
    tensorrt: Library | None
    tensorrt_rtx: Library | None
    gpus: tuple[Gpu, ...]
    driver: Driver | None
    folders: tuple[Folder, ...]
    visible: str | None = None


def this_machine(workspace: Path) -> Machine:
    """Collect the facts about this machine; ``workspace`` is the folder for artifacts.

    Each library is imported in a separate process, so that a crash becomes a finding.
    """
    with ThreadPoolExecutor(len(PROBES)) as pool:
        libraries = dict(zip(PROBES, pool.map(probe, PROBES), strict=True))
    return Machine(
        python=sys.version_info[:3],
        platform=platform_name(),
        packages=_packages(),
        requirements=_requirements(),
        torch=libraries["torch"],
        onnxruntime=libraries["onnxruntime"],
        tensorrt=libraries["tensorrt"],
        tensorrt_rtx=libraries["tensorrt_rtx"],
        gpus=gpus(),
        driver=driver(),
        folders=(_folder("workspace", workspace), _folder("cache", cache_folder())),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def _packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a partly removed package has a folder and no name
            found.setdefault(str(canonicalize_name(name)), distribution.version)
    return dict(sorted(found.items()))


def _requirements() -> tuple[str, ...]:
    try:
        texts = metadata.requires("clipdeploy") or []
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return ()
    required = map(Requirement, texts)
    applicable = [
        item for item in required if not item.marker or item.marker.evaluate({"extra": ""})
    ]
    return tuple(f"{item.name}{item.specifier}" for item in applicable)


def _folder(role: str, path: Path) -> Folder:
    """Check a folder, or its nearest existing parent if it does not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    problem = "" if existing.is_dir() else f"{existing} is a file"
    if not problem:
        try:
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            problem = error.strerror or str(error)
    return Folder(role, path, shutil.disk_usage(existing).free, problem)
