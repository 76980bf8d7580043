"""Options that say which class each image has, for verify, merge, deploy, search and bisect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from clipdeploy.cli.config_fields import choices_of, default_of
from clipdeploy.cli.options import option
from clipdeploy.cli.usage import refuse_unused, with_options

if TYPE_CHECKING:
    from clipdeploy.imaging import Labelling

__all__ = ["check_labelling", "class_names_option", "labelling", "labelling_options"]

_LABELLING = "clipdeploy.imaging.layouts.Labelling"

class_names_option = option(
    "--class-names",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Names of the classes in the order of the logits: one in each line, or JSON.",
    default_text="from the checkpoint, the folders or the label file",
)
_OPTIONS = (
    option(
        "--layout",
        type=click.Choice(choices_of(_LABELLING, "layout")),
        default=default_of(_LABELLING, "layout"),
        help="How labels are stored: class folders, NAME CLASS list, ILSVRC devkit, CSV table, or "
        "not at all.",
    ),
    option(
        "--labels",
        type=click.Path(path_type=Path),
        help="Label file.",
        default_text="one inside or beside the folder of images",
    ),
    option(
        "--first-class",
        type=click.Choice(["0", "1"]),
        help="Number of the first class, if folders or labels are numbers.",
        default_text="found from them, else 0",
    ),
    option(
        "--skip-unlabelled",
        is_flag=True,
        help="Leave out images without a class and print how many there are.",
    ),
)


def labelling_options(
    *, class_names: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that :func:`labelling` reads, with or without ``--class-names``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        more = (class_names_option,) if class_names else ()
        return with_options((*_OPTIONS, *more), function)

    return decorate


def check_labelling(options: dict[str, Any]) -> None:
    """Refuse labelling options that the layout does not use.

    Raises:
        UsageError: the command line gave such an option.
    """
    if options["layout"] in ("folders", "none"):
        refuse_unused(["labels"], "the layouts with a label file", "pass --layout list")
    if options["layout"] == "none":
        names = ("first_class", "skip_unlabelled", "class_names")
        refuse_unused(names, "the layouts with classes", "pass --layout auto")


def labelling(options: dict[str, Any]) -> Labelling:
    """The values of :func:`labelling_options` as a configuration."""
    from clipdeploy.imaging import Labelling

    first: Literal[0, 1] | None = {"0": 0, "1": 1, None: None}[options["first_class"]]
    return Labelling(
        layout=options["layout"],
        labels=options["labels"],
        first_class=first,
        skip_unlabelled=options["skip_unlabelled"],
        class_names=options["class_names"],
    )
