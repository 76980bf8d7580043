"""``clipdeploy``: the program, with its commands in the order of the pipeline."""

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
from clipdeploy.cli.text import format_warning
from clipdeploy.cli.usage import Group, group
from clipdeploy.cli.verify import verify
from clipdeploy.cli.zoo import zoo
from clipdeploy.core.printable import printable
from clipdeploy.core.version import __version__

__all__ = ["main"]


# The commands of the help, by heading, in the order in which they are used.
_SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Prepare": (zoo, export, calibrate, quantize, search, build_engine),
    "Judge": (verify, predict, bisect, benchmark, inspect),
    "Deploy": (package, deploy, demo),
    "Set up": (doctor, config, completion),
}


@contextmanager
def _without_control_characters() -> Iterator[None]:
    """Remove control characters from click's messages, which may quote a file name."""
    try:
        yield
    except click.ClickException as error:
        # Declared final, but click sets it only once, from what the user typed.
        cast(Any, error).message = printable(error.message, keep="\n")
        raise


class Program(Group):
    """The program; its exit code is the command's, even if the output cannot be written."""

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
        with _without_control_characters():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """See :class:`click.Command`; Ctrl-C outside a stage exits with 130 as well."""
        try:
            with _without_control_characters():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(EXIT_INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order of the pipeline, instead of the alphabet."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See :class:`click.Group`; the commands are listed by section, with whole summaries."""
        width = max(map(len, self.commands))
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(str(each.name).ljust(width), _summary(each)) for each in commands]
                )


def _summary(command: click.Command) -> str:
    """The first paragraph of the help, without a limit on its length."""
    return " ".join(str(command.help).partition("\n\n")[0].split()).removesuffix(".")


@group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Deploy CLIP ViT classifiers: from a PyTorch checkpoint to a verified TensorRT engine.

    \b
    clipdeploy export --model clip-vit-base-p16
    clipdeploy build-engine --int8 --data CALIBRATION_IMAGES
    clipdeploy verify --data IMAGENET_VAL

    Exit codes: 0 success, 1 error, 2 usage error, 3 verification failed, 130 interrupted.
    """
    # PyTorch's OpenMP threads spin while they wait and slow down the threads that decode images.
    # PyTorch reads this setting once, when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # clipdeploy refuses such images itself, with the file's name.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")
    warnings.formatwarning = format_warning


for commands in _SECTIONS.values():
    for command in commands:
        main.add_command(command)
