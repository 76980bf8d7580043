"""``clipdeploy deploy``: the whole pipeline in one command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.build import backend_option
from clipdeploy.cli.calibrate import images_option, seed_option
from clipdeploy.cli.common import (
    EXIT_VERIFICATION,
    Context,
    emit,
    force_option,
    model_option,
    skip_unreadable_option,
    stage_command,
    threads_option,
)
from clipdeploy.cli.export import weights_choice, weights_options
from clipdeploy.cli.labelling import check_labelling, labelling_options
from clipdeploy.cli.numbers import number
from clipdeploy.cli.params import setting_option
from clipdeploy.cli.quantize import (
    check_recipe_options,
    quantize_options,
    recipe_names,
    recipe_options,
)
from clipdeploy.cli.stage_display import StageDisplay
from clipdeploy.cli.usage import command, refuse_unused
from clipdeploy.cli.verify import (
    baseline_option,
    max_drop_option,
    max_drop_top5_option,
    verify_scope,
)
from clipdeploy.core.spans import IMAGES

if TYPE_CHECKING:
    from clipdeploy.stages.deploy.run import DeployConfig

# The parameters that decide which calibration images are observed.
_OBSERVED = ("images", "seed")
_FOLDER = click.Path(path_type=Path, file_okay=False)


@command(
    epilog="\b\n"
    "clipdeploy deploy --model clip-vit-base-p16 --calibration IMAGES --val IMAGENET_VAL\n"
    "clipdeploy deploy --fp16 --val IMAGENET_VAL --cpp classify",
)
@model_option
@click.option("--fp32", "precision", flag_value="fp32", help="Full precision.")
@click.option("--fp16", "precision", flag_value="fp16", help="Half precision.")
@click.option(
    "--int8", "precision", flag_value="int8", default=True, help="INT8 Linears (the default)."
)
@setting_option(
    "calibration",
    "--calibration",
    # Asked for by _calibration: beside --fp16, a setting is no contradiction.
    deferred=True,
    type=click.Path(path_type=Path),
    help="Folder or zip of calibration images; none of them may be among --val.",
)
@setting_option(
    "validation",
    "--val",
    type=click.Path(path_type=Path),
    required=True,
    help="Labelled images that judge: a folder, zip or tar.",
)
@max_drop_option
@max_drop_top5_option
@click.option(
    "--limit", type=number(IMAGES), help="Judge on so many images, spread over the classes."
)
@click.option(
    "--graphs-only",
    is_flag=True,
    help="Judge and package the ONNX graphs: for a machine that cannot run the engine.",
)
@baseline_option
@labelling_options(class_names=False)
@weights_options
@images_option
@seed_option
@recipe_options
@backend_option
@click.option("--no-benchmark", is_flag=True, help="Measure nothing, and build nothing to compare.")
@click.option(
    "--triton",
    metavar="DIR",
    type=_FOLDER,
    help="Model repository of a Triton server.  [default: triton in the model's folder]",
)
@click.option("--cpp", metavar="DIR", type=_FOLDER, help="C++ program with a CMakeLists.txt.")
@threads_option
@skip_unreadable_option
@force_option
@stage_command
def deploy(context: Context, model: str | None, **options: Any) -> int:
    """Export, calibrate, quantise, build, verify, benchmark and package, in one go.

    An interrupted run goes on where it stopped when the same command is given again. There is a
    package only after a verdict that passed; otherwise the exit code is 3. The page that says what
    was built, what it is worth and how to serve it lies in the model's folder: deployment.html.
    """
    config = _config(context, options)
    name = context.model(model)
    from clipdeploy.stages.deploy.run import deploy_model

    with StageDisplay(quiet=context.quiet) as display:
        result = deploy_model(
            context.workspace,
            name,
            config,
            force=options["force"],
            watch=display,
            note=display.note,
            progress=display,
        )
    emit(context, result, lambda: result)
    return 0 if result else EXIT_VERIFICATION


def _config(context: Context, options: dict[str, Any]) -> DeployConfig:
    """The options as a configuration."""
    from clipdeploy.engines.build_config import BuildConfig
    from clipdeploy.stages.calibrate import CalibrateConfig
    from clipdeploy.stages.deploy.config import SHORT_BENCHMARK, DeployConfig
    from clipdeploy.verification.verifier import VerifyConfig

    _check_used(options)
    weights, recipe = weights_choice(context, options)
    threads, skip = options["threads"], options["skip_unreadable"]
    return DeployConfig(
        val=options["val"],
        precision=options["precision"],
        calibration=_calibration(context, options),
        weights=weights,
        recipe=recipe,
        calibrate=CalibrateConfig(options["images"], options["seed"], skip, threads=threads),
        quantize=quantize_options(options),
        quantize_recipe=options["recipe"],
        build=BuildConfig(backend=options["backend"]),
        verify=VerifyConfig(
            options["max_drop"], options["max_drop_top5"], skip_unreadable=skip, threads=threads
        ),
        scope=verify_scope((), options | {"allow_leak": False, "class_names": None}),
        benchmark=None if options["no_benchmark"] else replace(SHORT_BENCHMARK, threads=threads),
        triton=options["triton"],
        cpp=options["cpp"],
    )


def _check_used(options: dict[str, Any]) -> None:
    """Refuse options that another one, or the precision that is deployed, leaves without effect.

    Raises:
        UsageError: the first of them.
    """
    check_recipe_options(options)
    check_labelling(options)
    if options["precision"] != "int8":
        names = ("calibration", *_OBSERVED, *recipe_names())
        refuse_unused(names, "--int8", "pass --int8")


def _calibration(context: Context, options: dict[str, Any]) -> Path | None:
    """Of the command line or a setting; a setting is not looked at where nothing is calibrated."""
    found: Path | None = options["calibration"]
    if found is None and options["precision"] == "int8":
        if (set_once := context.setting("calibration")) is not None:
            return Path(str(set_once))
        refuse_unused(_OBSERVED, "--calibration", "pass --calibration CALIBRATION_IMAGES")
    return found
