"""The models and images of the INT8 experiments: the demo, its variants, and held-out digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from outliers import make_variants

from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import export_model
from clipdeploy.workspace.folder import Workspace
from exporters.metrics import sqnr_db
from exporters.samples import normalise
from exporters.session import OnnxSession

F32 = NDArray[np.float32]
CALIBRATION = cards.demo_file("calibration.zip")
IMAGES = 200


def held_out_digits() -> F32:
    """Held-out digits, normalised, (IMAGES, 3, 32, 32)."""
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    chosen = select(open_images(cards.demo_file("test.zip")), IMAGES, seed=0)
    return normalise(np.stack([crop.pixels for crop in iter_crops(chosen, spec)]), spec)


def demo_graphs(variants: Path | None, folder: Path) -> Iterator[tuple[str, Path]]:
    """The name and the FP32 graph of the demo and of each variant, which are made if not given."""
    if variants is None:
        variants = folder / "variants"
        make_variants(variants)
    files = {"demo": None, **{path.stem: path for path in sorted(variants.glob("*.safetensors"))}}
    for name, file in files.items():
        workspace = Workspace(folder / name)
        export_model(workspace, cards.DEMO, WeightsChoice(file))
        yield name, workspace.graph(cards.DEMO, "fp32")


def logits(graph: Path, images: F32) -> F32:
    """The logits of ``graph``, computed as its 8-bit kernels do."""
    found: F32
    (found,) = OnnxSession(graph, exact_int8=True).run(images)
    return found


def decibels(reference: F32, found: F32) -> float:
    """The SQNR of ``found`` in dB, infinity where it equals ``reference``."""
    db = sqnr_db(reference, found)
    return float("inf") if db is None else db
