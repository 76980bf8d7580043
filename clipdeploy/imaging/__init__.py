"""List, label and select images, and decode them to crops ahead of use, with a cache."""

from clipdeploy.imaging.crops import CropCache
from clipdeploy.imaging.images import (
    ImageEntry,
    ImageFolder,
    open_images,
    select,
    survey,
    with_labels,
)
from clipdeploy.imaging.layouts import Labelling
from clipdeploy.imaging.scan import scan_images
from clipdeploy.imaging.stream import Crop, Skipped, iter_crops, stack_batches
from clipdeploy.imaging.survey import Reading, Survey

__all__ = [
    "Crop",
    "CropCache",
    "ImageEntry",
    "ImageFolder",
    "Labelling",
    "Reading",
    "Skipped",
    "Survey",
    "iter_crops",
    "open_images",
    "scan_images",
    "select",
    "stack_batches",
    "survey",
    "with_labels",
]
