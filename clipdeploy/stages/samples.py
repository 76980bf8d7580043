"""Sample images for checking graphs."""

from __future__ import annotations

import numpy as np

from clipdeploy.core.passport import Preprocess
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from exporters.samples import Samples

__all__ = ["sample_images"]


def sample_images(spec: Preprocess, count: int = 7) -> Samples:
    """A few real images to check graphs with: digits of the demo model."""
    digits = select(open_images(cards.demo_file("calibration.zip")), count, seed=0)
    return Samples(np.stack([crop.pixels for crop in iter_crops(digits, spec)]), spec)
