"""``clipdeploy build-engine``: graph to TensorRT engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipdeploy.cli.calibrate import images_option, seed_option
from clipdeploy.cli.common import (
    Context,
    data_option,
    emit,
    force_option,
    model_option,
    skip_unreadable_option,
    stage_command,
)
from clipdeploy.cli.numbers import number, whole_numbers
from clipdeploy.cli.params import how_to_give, setting_option
from clipdeploy.cli.quantize import (
    check_recipe_options,
    note_quality,
    quantize_config,
    recipe_names,
    recipe_options,
)
from clipdeploy.cli.settings import setting_called
from clipdeploy.cli.usage import (
    command,
    given,
    given_options,
    refuse_together,
    refuse_unused,
    with_options,
)
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, MEMORY_MIB, OPTIMIZATION

if TYPE_CHECKING:
    from clipdeploy.engines.backends import BackendOption
    from clipdeploy.engines.build_config import BuildConfig

backend_option = setting_option(
    "backend",
    "--backend",
    type=click.Choice(setting_called("backend").kind.choices),
    help="TensorRT flavour.",
)
# The parameters that decide which images are observed, and those of the default profile.
_CALIBRATION = ("images", "seed", "skip_unreadable")
_BATCHES = ("min_batch", "opt_batch", "max_batch")
_OPTIONS = (
    backend_option,
    click.option(
        "--min-batch", type=number(BATCH), default=1, show_default=True, help="Smallest batch."
    ),
    click.option(
        "--opt-batch", type=number(BATCH), default=8, show_default=True, help="Batch to tune for."
    ),
    click.option(
        "--max-batch", type=number(BATCH), default=32, show_default=True, help="Largest batch."
    ),
    click.option(
        "--profile",
        multiple=True,
        metavar="MIN,OPT,MAX",
        help="Instead of the three above; several times for an engine with several profiles.",
    ),
    click.option(
        "--memory-pool",
        type=number(MEMORY_MIB),
        metavar="MIB",
        help="Most scratch memory that a layer may use.",
    ),
    click.option(
        "--optimization-level",
        type=number(OPTIMIZATION),
        metavar="0..5",
        help="How long TensorRT searches for kernels; its own default is 3.",
    ),
    click.option(
        "--timing-cache/--no-timing-cache",
        default=True,
        show_default=True,
        help="Keep measured kernel times: faster builds, and twice the same engine.",
    ),
    click.option(
        "--version-compatible", is_flag=True, help="Runs on newer TensorRT of the same major."
    ),
    click.option(
        "--hardware-compatible",
        type=click.Choice(["none", "ampere-plus", "same-capability"]),
        default="none",
        show_default=True,
        help="Runs on other GPUs than this one, and slower.",
    ),
    click.option(
        "--strip-weights", is_flag=True, help="A small plan; the graph gives the weights at load."
    ),
    click.option("--refittable", is_flag=True, help="Weights can be replaced later."),
    click.option(
        "--compute-capability",
        multiple=True,
        metavar="M.N",
        help="TensorRT-RTX: only for these GPUs, such as 8.9; Ampere and newer if left out.",
    ),
)


def build_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide how an engine is compiled; :func:`build_config` reads them."""
    return with_options(_OPTIONS, function)


def build_config(options: dict[str, Any]) -> BuildConfig:
    """Take the values of :func:`build_options` out of ``options``, as a configuration."""
    from clipdeploy.engines.build_config import BuildConfig

    batches = tuple(options.pop(f"{name}_batch") for name in ("min", "opt", "max"))
    profiles = [_profile(text) for text in options.pop("profile")]
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
        profiles=tuple(profiles or [(batches[0], batches[1], batches[2])]),
        memory_pool_mib=options.pop("memory_pool"),
        **{name: options.pop(name) for name in names},
    )


def _profile(text: str) -> tuple[int, int, int]:
    numbers = whole_numbers(text, "--profile", "MIN,OPT,MAX, such as 1,8,32")
    if len(numbers) != 3:
        raise UsageError(f"--profile {text!r} is not three batches", hint="such as 1,8,32")
    return numbers[0], numbers[1], numbers[2]


def _calibration_images(context: Context, model: str) -> Path | None:
    """The setting's images where nothing is calibrated, or options of calibration are given.

    A setting takes no statistics away that somebody collected.
    """
    from clipdeploy.stages.calibrate import is_calibrated

    if not given_options(_CALIBRATION) and is_calibrated(context.workspace, model):
        return None
    found = context.setting("calibration")
    if found is None:
        refuse_unused(_CALIBRATION, "--data", "pass --data CALIBRATION_IMAGES")
    if found is None and not context.workspace.calibration(model).exists():
        raise UsageError(
            f"{model} has not been calibrated in {context.workspace.root}",
            hint=f"give {how_to_give('--data CALIBRATION_IMAGES', 'calibration')}",
        )
    return None if found is None else Path(str(found))


def _check_used(precision: str, options: dict[str, Any]) -> None:
    """Refuse options that another one, or the precision that is built, leaves without effect.

    Raises:
        UsageError: the first of them.
    """
    if precision != "int8":
        refuse_unused(("data", *_CALIBRATION, *recipe_names()), "--int8", "build --int8")
    if precision != "fp16":
        refuse_unused(["fp16_io"], "--fp16", "build --fp16")
    check_recipe_options(options)
    for name in _BATCHES:
        refuse_together("profile", name)


def _check_timing_cache(backend: BackendOption) -> None:
    """Refuse a choice about measured kernel times where a build measures none.

    Raises:
        UsageError: the command line made one.
        BuildError: there is no such TensorRT here.
    """
    if not given("timing_cache"):
        return
    from clipdeploy.engines.backends import choose_backend, targets_capabilities, tensorrt_module

    chosen = choose_backend(backend).backend
    if targets_capabilities(tensorrt_module(chosen)):
        mend = "build with --backend tensorrt"
        refuse_unused(["timing_cache"], f"another backend than {chosen}", mend)


def _check_batches(context: Context, model: str) -> None:
    """Refuse batches for a graph that was exported for a single one.

    Raises:
        UsageError: the command line gave some.
        ClipdeployError: there is no graph, or it cannot be read.
    """
    batch = context.workspace.source(model)[1].input.shape[0]
    if isinstance(batch, int):
        owner = f"a graph of any batch (this one was exported for {batch})"
        refuse_unused(("profile", *_BATCHES), owner, "export the model again without --batch")


@command(
    "build-engine",
    epilog="\b\n"
    "clipdeploy build-engine --fp16\n"
    "clipdeploy build-engine --int8 --data CALIBRATION_IMAGES --profile 1,8,32",
)
@model_option
@click.option("--fp32", "precision", flag_value="fp32", help="Full precision.")
@click.option(
    "--fp16", "precision", flag_value="fp16", default=True, help="Half precision (the default)."
)
@click.option("--int8", "precision", flag_value="int8", help="INT8 Linears, the rest FP16.")
@click.option("--fp16-io", is_flag=True, help="With --fp16: image and logits in half, too.")
@data_option(
    "Calibration images; with --int8, where none was calibrated yet.",
    "calibration",
    required=False,
    deferred=True,
)
@images_option
@seed_option
@skip_unreadable_option
@recipe_options
@build_options
@force_option
@stage_command
def build_engine(
    context: Context,
    model: str | None,
    precision: Literal["fp32", "fp16", "int8"],
    fp16_io: bool,
    data: Path | None,
    images: int | None,
    seed: int,
    skip_unreadable: bool,
    force: bool,
    **options: Any,
) -> None:
    """Compile an engine; calibrates and quantises first where that is due."""
    _check_used(precision, options)
    config = build_config(options)
    _check_timing_cache(config.backend)
    name = context.model(model)
    _check_batches(context, name)
    from clipdeploy.stages.build import build_model
    from clipdeploy.stages.calibrate import CalibrateConfig
    from clipdeploy.stages.quantize import model_quality
    from exporters.precision import Fp16Config

    quantize = quantize_config(context, name, options, "fp16")
    if data is None and precision == "int8":
        data = _calibration_images(context, name)
    artifact = build_model(
        context.workspace,
        name,
        precision,
        config,
        data=data,
        calibrate=CalibrateConfig(images, seed, skip_unreadable),
        fp16=Fp16Config(half_io=fp16_io),
        quantize=quantize,
        force=force,
        note=context.note,
        progress=context.progress,
    )
    if precision == "int8":
        note_quality(context, model_quality(context.workspace, name))
    made = artifact.passport
    for fallback in made.fallbacks:
        context.note(f"not compiled as asked: {fallback}")
    emit(
        context,
        artifact,
        lambda: (
            f"{artifact.path}: {made.plan_bytes / 1e6:.1f} MB, "
            + (f"built in {made.build_seconds:.1f} s" if artifact.changed else "unchanged, built")
            + f" by {made.backend} {made.backend_version}\n  {made.built_on}"
        ),
    )
