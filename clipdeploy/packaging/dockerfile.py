"""The image of a Triton server that fits a packaged model."""

from __future__ import annotations

from clipdeploy.engines.passport import EnginePassport
from clipdeploy.packaging.artifact import Packable
from clipdeploy.packaging.client import template
from clipdeploy.packaging.servers import IMAGE, MATRIX, server_for

__all__ = ["dockerfile"]


def dockerfile(source: Packable, name: str) -> str:
    """A server that fits; where none is known, one that has to be named to be built."""
    engine, release = source.engine, server_for(source.engine)
    if engine is None:
        what, reason = (
            "an ONNX graph",
            "# The newest release that clipdeploy knows; others will do.",
        )
    else:
        what = f"an engine of TensorRT {engine.backend_version}"
        reason = f"# Its TensorRT must be the engine's: {engine.backend_version}."
    if release is None:
        reason += f"\n# clipdeploy knows no release with it; {MATRIX} lists all:"
        reason += "\n#     docker build --build-arg TRITON=YY.MM ..."
    return template("Dockerfile").substitute(
        name=name,
        tag=name.lower(),
        what=what,
        reason=f"{reason}\nARG TRITON{f'={release}' if release else ''}",
        image=IMAGE,
        gpus="" if source.graph.precision == "int8-cpu" else " --gpus all",
        check=_same_tensorrt(engine) if engine else "",
        options=_server_options(engine),
    )


def _same_tensorrt(engine: EnginePassport) -> str:
    wanted = engine.backend_version
    return (
        "# NVIDIA's images say which TensorRT they hold; one that says nothing is let pass.\n"
        f'RUN case "${{TRT_VERSION:-{wanted}}}" in {wanted}*) ;; *) '
        f'echo "this server has TensorRT $TRT_VERSION, the engine needs {wanted}"; exit 1 ;; esac\n'
    )


def _server_options(engine: EnginePassport | None) -> str:
    if engine is None or not engine.settings.get("version_compatible"):
        return ""
    return ', "--backend-config=tensorrt,version-compatible=true"'
