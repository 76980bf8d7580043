"""Sample images and texts for checking graphs."""

from __future__ import annotations

import numpy as np

from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.clip.tokenizer import tokenize
from exporters.samples import Samples, TokenIds

__all__ = ["sample_images", "sample_texts"]

# Of 3, 16 and 77 tokens, the last one cut; start and end are among them.
_TEXTS = (
    "seven",
    "a photo of the digit 7, written in black ink by hand.",
    "a blurry photo of a golden retriever on a beach. " * 10,
)


def sample_images(spec: Preprocess, count: int = 7) -> Samples:
    """A few real images to check graphs with: digits of the demo model."""
    digits = select(open_images(cards.demo_file("calibration.zip")), count, seed=0)
    return Samples(np.stack([crop.pixels for crop in iter_crops(digits, spec)]), spec)


def sample_texts() -> TokenIds:
    """A short, a usual and a cut text to check text towers with, int32.

    Raises:
        UsageError: the extra ``clip`` is not installed.
    """
    return TokenIds(tokenize(_TEXTS).ids.astype(np.int32))
