"""``clipdeploy``: the group of commands."""

from __future__ import annotations

import click

from clipdeploy import __version__
from clipdeploy.cli.benchmark import benchmark
from clipdeploy.cli.bisect import bisect
from clipdeploy.cli.build import build_engine
from clipdeploy.cli.calibrate import calibrate
from clipdeploy.cli.completion import completion
from clipdeploy.cli.config import config
from clipdeploy.cli.demo import demo
from clipdeploy.cli.deploy import deploy
from clipdeploy.cli.doctor import doctor
from clipdeploy.cli.export import export
from clipdeploy.cli.inspect import inspect
from clipdeploy.cli.package import package
from clipdeploy.cli.predict import predict
from clipdeploy.cli.quantize import quantize
from clipdeploy.cli.search import search
from clipdeploy.cli.verify import verify
from clipdeploy.cli.zoo import zoo

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """CLIP-pretrained ViT classifiers from a PyTorch checkpoint to a proven TensorRT engine.

    \b
    clipdeploy export --model clip-vit-base-p16
    clipdeploy build-engine --int8 --data CALIBRATION_IMAGES
    clipdeploy verify --data IMAGENET_VAL

    Exit codes: 0 good, 1 error, 2 usage, 3 verification failed, 130 interrupted.
    """


for command in (
    zoo,
    export,
    calibrate,
    quantize,
    build_engine,
    verify,
    predict,
    bisect,
    search,
    benchmark,
    inspect,
    package,
    doctor,
    deploy,
    demo,
    config,
    completion,
):
    main.add_command(command)
