"""``clipdeploy``: the group of commands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import click

from clipdeploy.cli.benchmark import benchmark
from clipdeploy.cli.bisect import bisect
from clipdeploy.cli.build import build_engine
from clipdeploy.cli.calibrate import calibrate
from clipdeploy.cli.common import EXIT_INTERRUPTED
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
from clipdeploy.cli.streams import closing_code, drop_impossible_sizes, guard_streams
from clipdeploy.cli.usage import Group, group
from clipdeploy.cli.verify import verify
from clipdeploy.cli.zoo import zoo
from clipdeploy.core.printable import printable
from clipdeploy.core.version import __version__

__all__ = ["main"]


@contextmanager
def _shown_as_text() -> Iterator[None]:
    """What click prints of a wrong argument, such as a file's name, does not act on a terminal."""
    try:
        yield
    except click.ClickException as error:
        # Final for type checkers: click sets it once, from what the user typed.
        cast(Any, error).message = printable(error.message, keep="\n")
        raise


class Program(Group):
    """The program: its exit code is the command's, whatever happens to the output."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """See :class:`click.Command`."""
        guard_streams()
        drop_impossible_sizes()
        try:
            return super().main(*args, **extra)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise SystemExit(closing_code(code)) from None

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """See :class:`click.Command`."""
        with _shown_as_text():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """See :class:`click.Command`; a Ctrl-C outside a stage is 130 as well."""
        try:
            with _shown_as_text():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)


@group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """CLIP-pretrained ViT classifiers from a PyTorch checkpoint to a proven TensorRT engine.

    \b
    clipdeploy export --model clip-vit-base-p16
    clipdeploy build-engine --int8 --data CALIBRATION_IMAGES
    clipdeploy verify --data IMAGENET_VAL

    Exit codes: 0 good, 1 error, 2 usage, 3 verification failed, 130 interrupted.
    """
    # PyTorch's OpenMP threads spin while they wait, and take the cores from the threads that decode
    # images.  PyTorch reads the setting once, when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # clipdeploy refuses such images itself, with the file's name.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")


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
