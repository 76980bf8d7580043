"""Options that several commands share, each under the same name and with the same meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipdeploy.cli.config_fields import default_of, value_of
from clipdeploy.cli.numbers import number
from clipdeploy.cli.options import option
from clipdeploy.cli.params import ModelName, setting_option
from clipdeploy.core.errors import UsageError
from clipdeploy.core.spans import BATCH, IMAGES, SEED, THREADS

if TYPE_CHECKING:
    from clipdeploy.stages.cluster import ClusterConfig

__all__ = [
    "batch_option",
    "calibration_data_option",
    "calibration_images_option",
    "calibration_seed_option",
    "cluster_or_none",
    "cpu_option",
    "force_option",
    "model_option",
    "picture_option",
    "precision_options",
    "ray_option",
    "run_threads_option",
    "seed_option",
    "shard_option",
    "shard_or_none",
    "skip_unreadable_option",
    "threads_option",
    "trust_option",
    "val_data_option",
    "val_images_option",
]

Decorator = Callable[[Any], Any]

_CALIBRATE = "clipdeploy.stages.calibrate"
_MOST_CALIBRATION_IMAGES = value_of(f"{_CALIBRATE}._DEFAULT_IMAGES")

model_option = setting_option(
    "model",
    "--model",
    # Looked up by Context.model: a setting does not conflict with files.
    deferred=True,
    type=ModelName(),
    metavar="NAME",
    help="Name or alias of the model, see `clipdeploy zoo`.",
    default_text="the workspace's last one",
)
force_option = option("--force", is_flag=True, help="Repeat the work even if nothing has changed.")
skip_unreadable_option = option(
    "--skip-unreadable", is_flag=True, help="Leave out unreadable images and list their names."
)
trust_option = option(
    "--trust", is_flag=True, help="Load an engine even if it has no passport that confirms it."
)
ray_option = option(
    "--ray",
    metavar="ADDRESS",
    help="Distribute the work over a Ray cluster: HOST:PORT, auto, or local for this machine "
    "only. All nodes must see the workspace and the images under the same paths.",
    default_text="no cluster",
)
threads_option = option(
    "--threads",
    type=number(THREADS),
    default=0,
    show_default=False,
    metavar="COUNT",
    help="CPU threads; with --ray, of each shard. The last bits of the results depend on it.",
    default_text="OMP_NUM_THREADS, or one for each core",
)
run_threads_option = option(
    "--threads",
    type=number(THREADS),
    default=0,
    show_default=False,
    metavar="COUNT",
    help="CPU threads of ONNX Runtime.",
    default_text="OMP_NUM_THREADS, or one for each core",
)
cpu_option = option(
    "--cpu",
    is_flag=True,
    help="Write the graph for ONNX Runtime's INT8 kernels on a CPU: all other operators stay FP32.",
)
picture_option = option(
    "--output",
    "-o",
    "plot",
    type=click.Path(path_type=Path, dir_okay=False),
    formerly={"--plot": "--output"},
    help="Draw the result into this .png or .svg file.",
)


def batch_option(config: str, text: str = "Images per inference run.") -> Decorator:
    """``--batch``: how many images run at once; the default is that of ``config``."""
    return option(
        "--batch", type=number(BATCH), default=default_of(config, "batch"), metavar="N", help=text
    )


def seed_option(config: str, text: str) -> Decorator:
    """``--seed``, with the default of ``config``."""
    return option(
        "--seed", type=number(SEED), default=default_of(config, "seed"), metavar="N", help=text
    )


def _names(short: str, long: str, *, alone: bool) -> tuple[str, ...]:
    """Option names, the short one if only one kind of images is possible, and the parameter's."""
    parameter = long.removeprefix("--").replace("-", "_")
    return (short, long, parameter) if alone else (long, parameter)


def calibration_data_option(
    text: str, *, alone: bool = True, deferred: bool = False, **more: Any
) -> Decorator:
    """``--calibration-data``, and ``--data`` where the command takes no other images."""
    return setting_option(
        "calibration_data",
        *_names("--data", "--calibration-data", alone=alone),
        deferred=deferred,
        type=click.Path(path_type=Path),
        help=text,
        **more,
    )


def val_data_option(
    text: str, *, alone: bool = True, required: bool = True, **more: Any
) -> Decorator:
    """``--val-data``, and ``--data`` where the command takes no other images."""
    return setting_option(
        "val_data",
        *_names("--data", "--val-data", alone=alone),
        type=click.Path(path_type=Path),
        required=required,
        help=text,
        **more,
    )


def calibration_images_option(*, alone: bool = True, **more: Any) -> Decorator:
    """``--calibration-images``, and ``--images`` where the command takes no other images."""
    return option(
        *_names("--images", "--calibration-images", alone=alone),
        type=number(IMAGES),
        metavar="COUNT",
        help="Number of calibration images.",
        default_text=f"all, at most {_MOST_CALIBRATION_IMAGES}",
        **more,
    )


def val_images_option(
    text: str, default_text: str, *, alone: bool = True, **more: Any
) -> Decorator:
    """``--val-images``, and ``--images`` where the command takes no other images."""
    return option(
        *_names("--images", "--val-images", alone=alone),
        type=number(IMAGES),
        metavar="COUNT",
        help=text,
        default_text=default_text,
        **more,
    )


calibration_seed_option = seed_option(
    f"{_CALIBRATE}.CalibrateConfig", "Seed for choosing calibration images."
)


def precision_options(default: str) -> list[Decorator]:
    """``--fp32``, ``--fp16``, ``--int8`` and ``--fp8``, which choose the precision."""
    helps = {
        "fp32": "Full precision.",
        "fp16": "Half precision.",
        "int8": "INT8 for the Linears, FP16 for the rest.",
        "fp8": "FP8 (E4M3) for the Linears, FP16 for the rest; needs SM 8.9 or newer.",
    }
    return [
        option(
            f"--{name}",
            "precision",
            flag_value=name,
            show_default=False,
            help=f"{text[:-1]} (the default)." if name == default else text,
            **({"default": True} if name == default else {}),
        )
        for name, text in helps.items()
    ]


def shard_option(merge: str) -> Decorator:
    """``--shard I/N``; ``merge`` is the command that joins the shards."""
    return option(
        "--shard",
        metavar="I/N",
        help=f"Process only part I of N; `{merge}` joins the parts.",
        default_text="everything",
    )


def cluster_or_none(address: str | None) -> ClusterConfig | None:
    """The cluster that ``--ray`` names.

    Raises:
        UsageError: ``address`` is not the address of a cluster.
    """
    if address is None:
        return None
    from clipdeploy.stages.cluster import ClusterConfig

    return ClusterConfig(address)


def shard_or_none(text: str | None) -> tuple[int, int] | None:
    """``1/4`` as (1, 4).

    Raises:
        UsageError: ``text`` is not I/N.
    """
    if text is None:
        return None
    parts = text.split("/")
    # Python does not parse numbers of more than a few thousand digits.
    if len(parts) != 2 or not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise UsageError(f"--shard {text[:40]!r} is not I/N", hint="--shard 1/4 to --shard 4/4")
    return int(parts[0]), int(parts[1])
