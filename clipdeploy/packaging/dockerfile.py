"""Writes the Dockerfile of a Triton server that can serve a packaged model."""

from __future__ import annotations

import shlex

from clipdeploy.core.printable import printable
from clipdeploy.engines.backends import release_of
from clipdeploy.engines.passport import EnginePassport
from clipdeploy.packaging.artifact import Packable
from clipdeploy.packaging.client import template
from clipdeploy.packaging.servers import IMAGE, MATRIX, server_for

__all__ = ["docker_commands", "dockerfile"]


def docker_commands(name: str, folder: str, *, gpus: bool, known: bool) -> tuple[str, str]:
    """The commands that build and start the server; an unknown release becomes ``YY.MM``."""
    tag = name.lower()
    release = "" if known else "--build-arg TRITON=YY.MM "
    ports = "-p 8000:8000 -p 8001:8001 -p 8002:8002"
    return (
        f"docker build {release}-t {tag} {folder}",
        f"docker run --rm{' --gpus all' if gpus else ''} {ports} {tag}",
    )


def dockerfile(source: Packable, name: str) -> str:
    """Return the text of the Dockerfile; an unknown release becomes a build argument."""
    engine, release = source.engine, server_for(source.engine)
    if engine is None:
        what, reason = (
            "an ONNX graph",
            "# The newest known release; other releases also work.",
        )
    else:
        version = printable(release_of(engine.backend_version))
        what = f"an engine of TensorRT {version}"
        reason = f"# The server needs the TensorRT version of the engine: {version}."
    if release is None:
        reason += f"\n# No known release has it; look it up in {MATRIX}:"
        reason += "\n#     docker build --build-arg TRITON=YY.MM ..."
    gpus = source.graph.precision != "int8-cpu"
    build, run = docker_commands(name, ".", gpus=gpus, known=True)
    return template("Dockerfile").substitute(
        name=name,
        build=build,
        run=run,
        what=what,
        reason=f"{reason}\nARG TRITON{f'={release}' if release else ''}",
        image=IMAGE,
        check=_same_tensorrt(engine) if engine else "",
        options=_server_options(engine),
    )


def _same_tensorrt(engine: EnginePassport) -> str:
    needed = shlex.quote(printable(release_of(engine.backend_version)))
    return (
        "# NVIDIA's images set TRT_VERSION; an image that does not set it is accepted.\n"
        f'RUN needed={needed}; case "${{TRT_VERSION:-$needed}}" in "$needed"*) ;; *) '
        'echo "this server has TensorRT $TRT_VERSION, the engine needs $needed"; exit 1 ;; esac\n'
    )


def _server_options(engine: EnginePassport | None) -> str:
    if engine is None or not engine.settings.get("version_compatible"):
        return ""
    return ', "--backend-config=tensorrt,version-compatible=true"'
