"""Fixtures of the INT8 tests: the demo graph and table, held-out digits, INT8 graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calibration.config import QuantizeConfig
from calibration.qdq import quantize
from calibration.table import CalibrationTable, load_table
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import iter_crops, open_images
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.pipeline import sample_images
from clipdeploy.workspace.folder import Workspace
from exporters.samples import Samples, normalise


@pytest.fixture(scope="session")
def source(demo_workspace: Workspace) -> Path:
    """The demo card's FP32 graph."""
    return demo_workspace.graph(cards.DEMO, "fp32")


@pytest.fixture(scope="session")
def calibration(demo_workspace: Workspace) -> Path:
    """The demo card's calibration over 200 digits."""
    return demo_workspace.calibration(cards.DEMO)


@pytest.fixture(scope="session")
def demo_table(calibration: Path) -> CalibrationTable:
    """The demo card's calibration, loaded."""
    return load_table(calibration)


@pytest.fixture(scope="session")
def samples() -> Samples:
    """Three real images for checking float16 storage."""
    return sample_images(cards.find(cards.DEMO).preprocess(Recipe()), 3)


@pytest.fixture(scope="session")
def make_int8(
    tmp_path_factory: pytest.TempPathFactory, source: Path, calibration: Path, samples: Samples
) -> Callable[[QuantizeConfig], Path]:
    """Writes the demo card's INT8 graph of a configuration, once."""
    folder = tmp_path_factory.mktemp("int8")
    made: dict[QuantizeConfig, Path] = {}

    def make(config: QuantizeConfig) -> Path:
        if config not in made:
            path = folder / f"{len(made)}.onnx"
            quantize(source, calibration, path, samples, config)
            made[config] = path
        return made[config]

    return make


@pytest.fixture(scope="session")
def held_out(demo_model: LoadedModel) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The 500 held-out digits, normalised (500, 3, 32, 32), and their labels (500,)."""
    spec = demo_model.card.preprocess(demo_model.recipe)
    names = tuple(name for name, _ in cards.class_names(demo_model.card))
    crops = list(iter_crops(open_images(cards.demo_file("test.zip"), names), spec))
    assert len(crops) == 500
    labels = np.asarray([crop.entry.label for crop in crops], np.int64)
    return normalise(np.stack([crop.pixels for crop in crops]), spec), labels


@pytest.fixture(scope="session")
def reference(
    demo_model: LoadedModel, held_out: tuple[NDArray[np.float32], NDArray[np.int64]]
) -> NDArray[np.float32]:
    """PyTorch's logits (500, classes) of the held-out digits."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = demo_model.module(torch.from_numpy(held_out[0])).numpy()
    return logits
