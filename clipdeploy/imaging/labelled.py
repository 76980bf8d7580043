"""The images that a model is judged on, each with a class of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Passport
from clipdeploy.imaging import ImageFolder, Labelling, open_images, survey, with_labels
from clipdeploy.imaging.classes import read_class_names
from clipdeploy.models import cards

__all__ = ["open_labelled"]


def open_labelled(
    data: Path,
    passport: Passport,
    asked: Labelling,
    note: Callable[[str], object] = lambda text: None,
    *,
    required: bool = True,
) -> ImageFolder:
    """Images with the classes of the model that ``passport`` describes.

    ``note`` is told what is odd about them.  Random weights need no classes.  Unless ``required``,
    images may all be without a class.

    Raises:
        DatasetError: images or labels that cannot be used, some images without a class, or class
            names that are not the graph's.
        FileError: a label file or a file of class names cannot be read.
    """
    names = _class_names(passport, asked)
    # Labels mean nothing to random weights: any folder of images will do.
    unasked = passport.weights.kind == "random" and asked == Labelling()
    count = 0 if unasked else passport.classes
    images = open_images(data, () if unasked else names, count=count, asked=asked)
    found = survey(images)
    if required or found.classes:
        with_labels(images)
    note(f"{found.images:,} images, {found.classes:,} classes, labels: {found.layout}")
    for problem in found.problems():
        note(problem)
    return images


def _class_names(passport: Passport, asked: Labelling) -> tuple[str, ...]:
    if asked.class_names is None:
        return passport.class_names
    known = cards.class_names(cards.find(passport.model))
    names = read_class_names(asked.class_names, passport.classes, known)
    if passport.class_names and names != passport.class_names:
        raise DatasetError(
            f"{asked.class_names} has other names than the graph, whose classes are "
            f"{', '.join(passport.class_names[:2])}, ...",
            hint="leave out --class-names, or give it to "
            f"`clipdeploy export --model {passport.model}` and build the other artifacts again",
        )
    return names
