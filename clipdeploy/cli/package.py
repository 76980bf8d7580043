"""``clipdeploy package``: package an artifact for Triton or as a C++ program."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import default_of
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import ArtifactPath
from clipdeploy.cli.shared_options import model_option
from clipdeploy.cli.usage import command, refuse_together, refuse_unused
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, INSTANCES, QUEUE_DELAY

if TYPE_CHECKING:
    from clipdeploy.packaging.cpp import CppPackage
    from clipdeploy.packaging.triton import TritonPackage

_CONFIG = "clipdeploy.packaging.triton_config.TritonConfig"
_FOLDER = click.Path(path_type=Path, file_okay=False)


@command(
    epilog="\b\n"
    "clipdeploy package --triton models\n"
    "clipdeploy package --cpp classify artifacts/MODEL/fp16.onnx",
)
@click.argument("artifact", required=False, type=ArtifactPath())
@option(
    "--triton",
    metavar="DIR",
    type=_FOLDER,
    help="Add the artifact to the model repository of a Triton server in this folder.",
)
@option(
    "--cpp",
    metavar="DIR",
    type=_FOLDER,
    help="Write a C++ program with a CMakeLists.txt into this folder.",
)
@model_option
@option(
    "--name",
    metavar="NAME",
    help="Name of the model on the server.",
    default_text="MODEL-PRECISION",
)
@option(
    "--max-batch",
    type=number(BATCH),
    metavar="N",
    help="Largest batch of a request.",
    default_text="that of the engine; 32 for a graph",
)
@option(
    "--queue-delay",
    type=number(QUEUE_DELAY),
    metavar="MICROSECONDS",
    help="How long a request waits for others to share its batch, in microseconds.",
    default_text=str(default_of(_CONFIG, "queue_delay")),
)
@option(
    "--instances",
    type=number(INSTANCES),
    metavar="COUNT",
    help="Copies of the model on each GPU.",
    default_text=str(default_of(_CONFIG, "instances")),
)
@option(
    "--force",
    is_flag=True,
    help="Replace what is there: the program, or the newest version of the model.",
)
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
    """Package an artifact for Triton, or as a C++ program.

    ARTIFACT is an .onnx or .engine file; without it, the best artifact of the model.
    """
    one = "package takes either --triton DIR or --cpp DIR"
    refuse_together("triton", "cpp", hint=one)
    if triton is None and cpp is None:
        raise UsageError(one, hint="pass one of them")
    if triton is None:
        refuse_unused(options, "--triton", "pass --triton DIR")
    refuse_together("artifact", "model", hint="leave out --model: the file has its own")
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
    text = " --text TEXT" if made.text else ""
    return "\n".join(
        [
            _version(made, "images"),
            *([_version(made.text, "texts")] if made.text else []),
            f"  server  {made.server or 'unknown, see its Dockerfile'}",
            *_reference(made),
            f"  client  -> python {shlex.quote(str(made.path / 'client.py'))} IMAGE{text}",
        ]
    )


def _reference(made: TritonPackage | CppPackage) -> list[str]:
    return [f"  reference  {made.reference.sentence}"] if made.reference else []


def _version(made: TritonPackage, what: str) -> str:
    done = "written" if made.changed else "unchanged"
    batches = f"up to {made.max_batch} {what}" if made.max_batch else "one fixed batch"
    return f"{made.path}: version {made.version} {done}, {batches} at once"


def _render_cpp(made: CppPackage) -> str:
    build, check = made.commands
    return "\n".join(
        [
            f"{made.path}: {'written' if made.changed else 'unchanged'}, for {made.runtime}",
            *_reference(made),
            f"  build   -> {build}",
            f"  check   -> {check}",
        ]
    )
