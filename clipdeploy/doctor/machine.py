"""The facts of a machine, as clipdeploy needs them."""

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
    """A folder that clipdeploy writes; ``problem`` says why it cannot, empty where it can."""

    role: str
    path: Path
    free_bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Machine:
    """Everything that :func:`clipdeploy.doctor.diagnose` judges.

    ``packages`` are the installed distributions and their versions; ``requirements`` those that
    clipdeploy asks for on this platform, such as ``numpy>=1.26``.  The four libraries are None
    where they are not installed.  ``visible`` is CUDA_VISIBLE_DEVICES, None where it is not set.
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
    """Look at the machine that this process runs on; ``workspace`` is where artifacts would lie.

    Each library is imported in a process of its own: one that crashes is a finding, too.
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
        if name:  # a half-removed package has a folder and no name
            found.setdefault(str(canonicalize_name(name)), distribution.version)
    return dict(sorted(found.items()))


def _requirements() -> tuple[str, ...]:
    try:
        texts = metadata.requires("clipdeploy") or []
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return ()
    asked = map(Requirement, texts)
    here = [item for item in asked if not item.marker or item.marker.evaluate({"extra": ""})]
    return tuple(f"{item.name}{item.specifier}" for item in here)


def _folder(role: str, path: Path) -> Folder:
    """A folder as it is, or as it could be made: the nearest one above it that exists."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    problem = "" if there.is_dir() else f"{there} is a file"
    if not problem:
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            problem = error.strerror or str(error)
    return Folder(role, path, shutil.disk_usage(there).free, problem)
