"""``clipdeploy build-engine``: compile a TensorRT engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.numbers import number, whole_numbers
from clipdeploy.cli.options import option
from clipdeploy.cli.params import how_to_give, setting_option
from clipdeploy.cli.quantize import (
    check_recipe_options,
    note_quality,
    quantize_config,
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
)
from clipdeploy.cli.usage import (
    command,
    given,
    given_options,
    refuse_together,
    refuse_unused,
    with_options,
)
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import QUANTISED, Precision, Tower
from clipdeploy.core.spans import BATCH, MEMORY_MIB, OPTIMIZATION

if TYPE_CHECKING:
    from clipdeploy.engines.backends import BackendOption
    from clipdeploy.engines.build_config import BuildConfig

_BUILD = "clipdeploy.engines.build_config.BuildConfig"
_DEFAULT_PROFILE = default_of(_BUILD, "profiles")[0]

backend_option = setting_option(
    "backend",
    "--backend",
    type=click.Choice(choices_of(_BUILD, "backend")),
    help="TensorRT variant.",
)
profile_option = option(
    "--profile",
    multiple=True,
    metavar="MIN,OPT,MAX",
    help="Smallest, optimal and largest batch of the engine; may be given several times.",
    default_text=",".join(map(str, _DEFAULT_PROFILE)),
)
# The parameters that choose the observed images, and those of the default profile.
_CALIBRATION = ("calibration_images", "seed", "skip_unreadable")
_BATCHES = ("min_batch", "opt_batch", "max_batch")
_BATCH_HELP = (
    "Smallest batch of the engine.",
    "Batch that the engine is optimised for.",
    "Largest batch of the engine.",
)
_OPTIONS = (
    backend_option,
    *(
        option(
            f"--{name.replace('_', '-')}",
            type=number(BATCH),
            default=batch,
            metavar="N",
            help=text,
        )
        for name, batch, text in zip(_BATCHES, _DEFAULT_PROFILE, _BATCH_HELP, strict=True)
    ),
    profile_option,
    option(
        "--memory-pool",
        type=number(MEMORY_MIB),
        metavar="MIB",
        help="Maximum scratch memory of a layer in MiB.",
        default_text="TensorRT's",
    ),
    option(
        "--optimization-level",
        type=number(OPTIMIZATION),
        metavar="LEVEL",
        help="How long TensorRT searches for kernels; 5 is the longest.",
        default_text="TensorRT's, which is 3",
    ),
    option(
        "--timing-cache/--no-timing-cache",
        default=default_of(_BUILD, "timing_cache"),
        help="Cache kernel times: builds are faster, and a second build gives the same engine.",
    ),
    option(
        "--version-compatible",
        is_flag=True,
        help="Let the engine run on newer TensorRT versions of the same major version.",
    ),
    option(
        "--hardware-compatible",
        type=click.Choice(choices_of(_BUILD, "hardware_compatible")),
        default=default_of(_BUILD, "hardware_compatible"),
        help="Let the engine run on other GPUs than this one, more slowly.",
    ),
    option(
        "--strip-weights",
        is_flag=True,
        help="Write a small engine without weights; they are taken from the graph when it loads.",
    ),
    option("--refittable", is_flag=True, help="Allow the weights to be replaced later."),
    option(
        "--compute-capability",
        multiple=True,
        metavar="M.N",
        help="TensorRT-RTX: GPUs to build for, such as 8.9; may be given several times.",
        default_text="Ampere and newer; with --fp8 Ada and newer",
    ),
)


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the compiler; :func:`build_config` reads them."""
    return with_options(_OPTIONS, function)


def build_config(options: dict[str, Any]) -> BuildConfig:
    """Take the values of :func:`build_options` out of ``options``, as a configuration."""
    from clipdeploy.engines.build_config import BuildConfig

    batches = tuple(options.pop(f"{name}_batch") for name in ("min", "opt", "max"))
    profiles = read_profiles(options.pop("profile"))
    names = (
        "backend",
        "optimization_level",
        "timing_cache",
        "version_compatible",
        "hardware_compatible",
        "strip_weights",
        "refittable",
        "compute_capability",
    )
    return BuildConfig(
        profiles=profiles or ((batches[0], batches[1], batches[2]),),
        memory_pool_mib=options.pop("memory_pool"),
        **{name: options.pop(name) for name in names},
    )


def read_profiles(texts: Iterable[str]) -> tuple[tuple[int, int, int], ...]:
    """The values of ``--profile`` as batch profiles.

    Raises:
        UsageError: a value is not three whole numbers.
    """
    return tuple(map(_profile, texts))


def _profile(text: str) -> tuple[int, int, int]:
    numbers = whole_numbers(text, "--profile", "MIN,OPT,MAX, such as 1,8,32")
    if len(numbers) != 3:
        raise UsageError(f"--profile {text!r} is not three batches", hint="such as 1,8,32")
    return numbers[0], numbers[1], numbers[2]


def _calibration_images(context: Context, model: str) -> Path | None:
    """The setting's images if the model is not calibrated or calibration options are given.

    Otherwise a setting does not replace the statistics of an earlier calibration.
    """
    from clipdeploy.stages.calibrate import is_calibrated

    if not given_options(_CALIBRATION) and is_calibrated(context.workspace, model):
        return None
    found = context.setting("calibration_data")
    if found is None:
        refuse_unused(_CALIBRATION, "--data", "pass --data CALIBRATION_IMAGES")
    if found is None and not context.workspace.calibration(model).exists():
        raise UsageError(
            f"{model} has not been calibrated in {context.workspace.root}",
            hint=f"give {how_to_give('--data CALIBRATION_IMAGES', 'calibration_data')}",
        )
    return None if found is None else Path(str(found))


def _check_used(precision: str, options: dict[str, Any]) -> None:
    """Refuse options that have no effect with the precision or with other options.

    Raises:
        UsageError: it names the first one.
    """
    if precision not in QUANTISED:
        names = ("calibration_data", *_CALIBRATION, *recipe_names())
        refuse_unused(names, "--int8 and --fp8", "build --int8 or --fp8")
    if precision != "fp16":
        refuse_unused(["fp16_io"], "--fp16", "build --fp16")
    check_recipe_options(options, fp8=precision == "fp8")
    for name in _BATCHES:
        refuse_together("profile", name)


def _check_timing_cache(backend: BackendOption) -> None:
    """Refuse the options of the timing cache if the build measures no kernel times.

    Raises:
        UsageError: the command line gave one.
        BuildError: that TensorRT is not installed here.
    """
    if not given("timing_cache"):
        return
    from clipdeploy.engines.backends import choose_backend, targets_capabilities, tensorrt_module

    chosen = choose_backend(backend).backend
    if targets_capabilities(tensorrt_module(chosen)):
        mend = "build with --backend tensorrt"
        refuse_unused(["timing_cache"], f"another backend than {chosen}", mend)


def _check_batches(context: Context, model: str, tower: Tower) -> None:
    """Refuse batch options for a graph that was exported with a fixed batch.

    Raises:
        UsageError: the command line gave one.
        ClipdeployError: there is no graph, or it cannot be read.
    """
    batch = context.workspace.source(model, tower)[1].input.shape[0]
    if isinstance(batch, int):
        owner = f"a graph of any batch (this one was exported for {batch})"
        refuse_unused(("profile", *_BATCHES), owner, "export the model again without --fixed-batch")


def _precision_options(function: Callable[..., Any]) -> Callable[..., Any]:
    return with_options(precision_options("fp16"), function)


@command(
    "build-engine",
    epilog="\b\n"
    "clipdeploy build-engine --fp16\n"
    "clipdeploy build-engine --int8 --data CALIBRATION_IMAGES --profile 1,8,32",
)
@model_option
@_precision_options
@option(
    "--text-tower",
    is_flag=True,
    help="Build the text tower of an embedding model, in FP16 or FP32.",
)
@option("--fp16-io", is_flag=True, help="With --fp16: make the image and the logits FP16 as well.")
@calibration_data_option(
    "With --int8 and --fp8: calibration images, if the model has not been calibrated yet.",
    deferred=True,
)
@calibration_images_option()
@calibration_seed_option
@skip_unreadable_option
@recipe_options
@build_options
@force_option
@stage_command
def build_engine(
    context: Context,
    model: str | None,
    precision: Precision,
    text_tower: bool,
    fp16_io: bool,
    calibration_data: Path | None,
    calibration_images: int | None,
    seed: int,
    skip_unreadable: bool,
    force: bool,
    **options: Any,
) -> None:
    """Compile a TensorRT engine.

    Calibrates and quantises first if necessary.
    """
    _check_used(precision, options)
    config = build_config(options)
    _check_timing_cache(config.backend)
    name = context.model(model)
    tower: Tower = "text" if text_tower else "image"
    _check_batches(context, name, tower)
    from clipdeploy.stages.build import build_model
    from clipdeploy.stages.calibrate import CalibrateConfig
    from clipdeploy.stages.quantize import model_quality
    from exporters.precision import Fp16Config

    quantize = quantize_config(context, name, options, "fp16", precision)
    if calibration_data is None and precision in QUANTISED and not text_tower:
        calibration_data = _calibration_images(context, name)
    artifact = build_model(
        context.workspace,
        name,
        precision,
        config,
        data=calibration_data,
        calibrate=CalibrateConfig(calibration_images, seed, skip_unreadable),
        fp16=Fp16Config(half_io=fp16_io),
        quantize=quantize,
        tower=tower,
        force=force,
        note=context.note,
        progress=context.progress,
    )
    if precision in QUANTISED:
        note_quality(context, model_quality(context.workspace, name, precision))
    made = artifact.passport
    # With images, the calibration has just noted them.
    for finding in made.graph.calibration_findings if calibration_data is None else ():
        context.note(f"the calibration: {finding}")
    for remark in artifact.remarks:
        context.note(remark)
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {made.plan_bytes / 1e6:.1f} MB, "
            + (f"built in {made.build_seconds:.1f} s" if artifact.changed else "unchanged, built")
            + f" by {made.backend} {made.backend_version}\n  {made.built_on}"
        ),
    )
