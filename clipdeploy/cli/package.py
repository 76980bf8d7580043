"""``clipdeploy package``: an artifact made ready for production."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import Context, emit, model_option, stage_command
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.usage import command, refuse_together, refuse_unused
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, INSTANCES, QUEUE_DELAY

if TYPE_CHECKING:
    from clipdeploy.packaging.cpp import CppPackage
    from clipdeploy.packaging.triton import TritonPackage

_FOLDER = click.Path(path_type=Path, file_okay=False)


@command(
    epilog="\b\n"
    "clipdeploy package --triton models\n"
    "clipdeploy package --cpp classify artifacts/MODEL/fp16.onnx",
)
@click.argument("artifact", required=False, type=ArtifactPath())
@click.option("--triton", metavar="DIR", type=_FOLDER, help="Model repository of a Triton server.")
@click.option("--cpp", metavar="DIR", type=_FOLDER, help="C++ program with a CMakeLists.txt.")
@model_option
@click.option("--name", help="On the server; MODEL-PRECISION if left out.")
@click.option(
    "--max-batch",
    type=number(BATCH),
    help="Largest batch.  [default: the engine's; graphs: 32]",
)
@click.option(
    "--queue-delay",
    type=number(QUEUE_DELAY),
    metavar="MICROSECONDS",
    help="How long a request waits for others to share its batch.  [default: 500]",
)
@click.option(
    "--instances", type=number(INSTANCES), help="Copies of the model on a GPU.  [default: 1]"
)
@click.option("--force", is_flag=True, help="Replace what is there; the newest version of a model.")
@stage_command
def package(
    context: Context,
    artifact: Path | None,
    triton: Path | None,
    cpp: Path | None,
    model: str | None,
    force: bool,
    **options: Any,
) -> None:
    """Package ARTIFACT (.onnx, .engine) for production, or the best one of a model."""
    one = "package takes one of --triton DIR and --cpp DIR"
    refuse_together("triton", "cpp", hint=one)
    if triton is None and cpp is None:
        raise UsageError(one, hint="pass one of them")
    if triton is None:
        refuse_unused(options, "--triton", "pass --triton DIR")
    refuse_together("artifact", "model", hint="no --model beside a file: it has its own")
    chosen = {option: value for option, value in options.items() if value is not None}
    from clipdeploy.packaging.triton_config import TritonConfig
    from clipdeploy.stages.package import artifact_to_package, package_cpp, package_triton

    config = TritonConfig(**chosen)
    if artifact is None:
        artifact = artifact_to_package(context.workspace, context.model(model))
        context.note(f"artifact: {artifact}")
    if triton:
        model_folder = package_triton(artifact, triton, config, force=force)
        _show(context, model_folder, _render_triton(model_folder))
    elif cpp:
        program = package_cpp(artifact, cpp, force=force)
        _show(context, program, _render_cpp(program))


def _show(context: Context, made: TritonPackage | CppPackage, shown: str) -> None:
    for note in made.notes:
        context.note(f"note: {note}")
    emit(context, made, lambda: shown)


def _render_triton(made: TritonPackage) -> str:
    done = "written" if made.changed else "unchanged"
    batches = f"up to {made.max_batch} images" if made.max_batch else "one fixed batch"
    return "\n".join(
        [
            f"{made.path}: version {made.version} {done}, {batches} at once",
            f"  server  {made.server or 'not known, see its Dockerfile'}",
            f"  client  -> python {shlex.quote(str(made.path / 'client.py'))} IMAGE",
        ]
    )


def _render_cpp(made: CppPackage) -> str:
    build, check = made.commands
    return "\n".join(
        [
            f"{made.path}: {'written' if made.changed else 'unchanged'}, for {made.runtime}",
            f"  build   -> {build}",
            f"  check   -> {check}",
        ]
    )
