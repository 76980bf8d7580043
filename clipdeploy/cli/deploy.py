"""``clipdeploy deploy``: run the whole pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.build import backend_option, profile_option, read_profiles
from clipdeploy.cli.common import EXIT_VERIFICATION, Context, emit, stage_command
from clipdeploy.cli.export import model_or_none, weights_choice, weights_options
from clipdeploy.cli.labelling import check_labelling, labelling_options
from clipdeploy.cli.options import option
from clipdeploy.cli.quantize import (
    check_recipe_options,
    quantize_options,
    recipe_names,
    recipe_options,
)
from clipdeploy.cli.shared_options import (
    calibration_data_option,
    calibration_images_option,
    calibration_seed_option,
    force_option,
    model_option,
    precision_options,
    skip_unreadable_option,
    threads_option,
    val_data_option,
    val_images_option,
)
from clipdeploy.cli.stage_display import StageDisplay
from clipdeploy.cli.usage import command, refuse_unused, with_options
from clipdeploy.cli.verify import (
    baseline_option,
    max_drop_option,
    max_drop_top5_option,
    verify_scope,
)
from clipdeploy.core.passport import QUANTISED

if TYPE_CHECKING:
    from clipdeploy.engines.build_config import BuildConfig
    from clipdeploy.stages.deploy.run import DeployConfig

# The parameters that choose the observed calibration images.
_OBSERVED = ("calibration_images", "seed")
_FOLDER = click.Path(path_type=Path, file_okay=False)


def _precision_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(precision_options("int8"), function)


@command(
    epilog="\b\n"
    "clipdeploy deploy --model clip-vit-base-p16 --calibration-data IMAGES --val-data VAL\n"
    "clipdeploy deploy --fp16 --val-data VAL --cpp classify",
)
@model_option
@_precision_options
@calibration_data_option(
    "Calibration images: a folder or archive; none of them may be in --val-data.",
    alone=False,
    # Read by _calibration: with --fp16, the setting does not conflict.
    deferred=True,
    formerly={"--calibration": "--calibration-data"},
)
@val_data_option(
    "Labelled images to judge on: a folder, zip or tar.",
    alone=False,
    formerly={"--val": "--val-data"},
)
@max_drop_option
@max_drop_top5_option
@val_images_option(
    "Number of images to judge on, spread over the classes.",
    "all",
    alone=False,
    formerly={"--limit": "--val-images"},
)
@option(
    "--graphs-only",
    is_flag=True,
    help="Judge and package the ONNX graphs, on a machine that cannot run the engine.",
)
@baseline_option
@labelling_options(class_names=False)
@weights_options
@calibration_images_option(alone=False, formerly={"--images": "--calibration-images"})
@calibration_seed_option
@recipe_options
@backend_option
@profile_option
@option(
    "--no-benchmark",
    is_flag=True,
    help="Skip the benchmark, and do not build the engine that it compares with.",
)
@option(
    "--triton",
    metavar="DIR",
    type=_FOLDER,
    help="Write a model repository for a Triton server into this folder.",
    default_text="triton in the model's folder",
)
@option(
    "--cpp",
    metavar="DIR",
    type=_FOLDER,
    help="Write a C++ program with a CMakeLists.txt into this folder.",
)
@threads_option
@skip_unreadable_option
@force_option
@stage_command
def deploy(context: Context, model: str | None, **options: Any) -> int:
    """Run all stages, from the checkpoint to a verified package.

    Exports, calibrates, quantises, builds, verifies, benchmarks and packages. To continue an
    interrupted run, give the same command again. A package is made only if the verification passes;
    otherwise the exit code is 3. The results and how to serve the package are described in
    deployment.html in the model's folder.
    """
    config = _config(context, options)
    name = model_or_none(context, model, config.weights)
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
    from clipdeploy.stages.calibrate import CalibrateConfig
    from clipdeploy.stages.deploy.config import SHORT_BENCHMARK, DeployConfig
    from clipdeploy.verification.verifier import VerifyConfig

    _check_used(options)
    weights, recipe = weights_choice(context, options)
    threads, skip = options["threads"], options["skip_unreadable"]
    return DeployConfig(
        val=options["val_data"],
        precision=options["precision"],
        calibration=_calibration(context, options),
        weights=weights,
        recipe=recipe,
        calibrate=CalibrateConfig(
            options["calibration_images"], options["seed"], skip, threads=threads
        ),
        quantize=quantize_options(options),
        quantize_recipe=options["recipe"],
        build=_build_config(options),
        verify=VerifyConfig(
            options["max_drop"], options["max_drop_top5"], skip_unreadable=skip, threads=threads
        ),
        scope=verify_scope((), options | {"allow_leak": False, "class_names": None}),
        benchmark=None if options["no_benchmark"] else replace(SHORT_BENCHMARK, threads=threads),
        triton=options["triton"],
        cpp=options["cpp"],
    )


def _build_config(options: dict[str, Any]) -> BuildConfig:
    from clipdeploy.engines.build_config import BuildConfig

    config = BuildConfig(backend=options["backend"])
    profiles = read_profiles(options["profile"])
    return replace(config, profiles=profiles) if profiles else config


def _check_used(options: dict[str, Any]) -> None:
    """Refuse options that have no effect with the precision or with other options.

    Raises:
        UsageError: it names the first one.
    """
    precision = options["precision"]
    check_recipe_options(options, fp8=precision == "fp8")
    check_labelling(options)
    if precision not in QUANTISED:
        names = ("calibration_data", *_OBSERVED, *recipe_names())
        refuse_unused(names, "--int8 and --fp8", "pass --int8 or --fp8")


def _calibration(context: Context, options: dict[str, Any]) -> Path | None:
    """The images of the command line, else of the setting, which only INT8 and FP8 read."""
    found: Path | None = options["calibration_data"]
    if found is None and options["precision"] in QUANTISED:
        if (set_once := context.setting("calibration_data")) is not None:
            return Path(str(set_once))
        mend = "pass --calibration-data CALIBRATION_IMAGES"
        refuse_unused(_OBSERVED, "--calibration-data", mend)
    return found
