"""``*.engine.json``: what an engine is, what it was compiled from, by what, and where."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from exporters.artifact import Passport, from_json, to_json
from exporters.errors import ArtifactError
from exporters.files import file_errors, sha256_file, write_atomic

__all__ = ["EnginePassport", "library_versions", "load_engine_passport", "passport_path"]

_LIBRARIES = ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "polygraphy", "numpy")


@dataclass(frozen=True)
class EnginePassport:
    """An engine's passport.

    ``plan_sha256`` and ``plan_bytes`` are of the engine file; ``profile`` is (min, opt, max)
    batch; ``built_on`` is the GPU's name and SM, or says that there was none.
    """

    graph: Passport
    graph_sha256: str
    plan_sha256: str
    plan_bytes: int
    build_seconds: float
    backend: str
    backend_version: str
    profile: tuple[int, int, int]
    built_on: str
    platform: str
    schema: int = 1


def passport_path(engine: Path) -> Path:
    """Where the passport of an engine lies."""
    return engine.with_name(engine.name + ".json")


def save_engine_passport(passport: EnginePassport, engine: Path) -> None:
    """Write the passport beside its engine.

    Raises:
        FileError: no permission, no space.
    """
    write_atomic(passport_path(engine), to_json(passport))


def load_engine_passport(engine: Path) -> EnginePassport:
    """Read the passport of an engine and hold it against the engine's bytes.

    Raises:
        FileError: the engine cannot be read.
        ArtifactError: no passport, an unreadable one, or one of other bytes.
    """
    path = passport_path(engine)
    if not path.exists():
        raise ArtifactError(
            f"{engine} has no passport ({path.name})", hint="build it again with build-engine"
        )
    with file_errors("read", path):
        passport = from_json(path.read_bytes(), EnginePassport, str(path))
    if sha256_file(engine) != passport.plan_sha256:
        raise ArtifactError(
            f"{engine} is not the file its passport speaks of: it was changed or cut short",
            hint="build it again with build-engine",
        )
    return passport


def library_versions() -> dict[str, str]:
    """Python, clipdeploy and the libraries that decide the numbers, by name."""
    from clipdeploy import __version__

    versions = {"clipdeploy": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def platform_name() -> str:
    """What an engine is bound to beside the GPU: ``linux x86_64``."""
    return f"{sys.platform} {platform.machine()}"
