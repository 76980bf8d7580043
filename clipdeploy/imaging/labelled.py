"""Open labelled images and check their classes against a model's."""

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
    labelling: Labelling,
    note: Callable[[str], object] = lambda text: None,
    *,
    required: bool = True,
) -> ImageFolder:
    """Open images and label them with the classes of the model in ``passport``.

    Args:
        data: a folder or archive of images.
        passport: the graph's passport.  With random weights labels are read only if ``labelling``
            is set.
        labelling: how labels are stored.
        note: called with a summary and with each problem found.
        required: raise an error if no image has a class.

    Raises:
        DatasetError: the images or labels cannot be used, an image has no class, or the class
            names differ from the graph's.
        FileError: a label file or class names file cannot be read.
    """
    names = _class_names(passport, labelling)
    # A model with random weights has no accuracy, so its images need no labels.
    ignored = passport.weights.kind == "random" and labelling == Labelling()
    count = 0 if ignored else passport.classes
    images = open_images(data, () if ignored else names, count=count, labelling=labelling)
    found = survey(images)
    if required or found.classes:
        with_labels(images)
    note(f"{found.images:,} images, {found.classes:,} classes, labels: {found.layout}")
    for problem in found.problems():
        note(problem)
    return images


def _class_names(passport: Passport, labelling: Labelling) -> tuple[str, ...]:
    if labelling.class_names is None:
        return passport.class_names
    known = cards.class_names(cards.find(passport.model))
    names = read_class_names(labelling.class_names, passport.classes, known)
    if passport.class_names and names != passport.class_names:
        raise DatasetError(
            f"the class names in {labelling.class_names} differ from the graph's: "
            f"{', '.join(passport.class_names[:2])}, ...",
            hint="remove --class-names, or pass it to "
            f"`clipdeploy export --model {passport.model}` and build the other artifacts again",
        )
    return names
