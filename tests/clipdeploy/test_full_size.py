"""ViT-B itself, at each of its five geometries, from files in the published layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import write_legacy_flat, write_nested_zip
from reference_vit import reference_logits

from clipdeploy import zoo
from clipdeploy.model import WeightsChoice, random_tensors
from clipdeploy.pipeline import export_model, sample_images
from clipdeploy.runners import OnnxRunner
from clipdeploy.vit import ViTConfig
from clipdeploy.workspace import Workspace

pytestmark = pytest.mark.slow

# float32 against float64 costs 4e-6 on these weights; tanh GELU, the smallest mistake, 1e-3.
TOLERANCE = 1e-4


@pytest.mark.parametrize(
    "alias",
    [
        "clip-vit-base-p32",
        "clip-vit-base-p32-384px",
        "clip-vit-base-p32-448px",
        "clip-vit-base-p16",
        "clip-vit-base-p16-384px",
    ],
)
def test_both_wrappings_export_to_the_architecture_itself(alias: str, tmp_path: Path) -> None:
    card = zoo.find(alias)
    tensors = random_tensors(ViTConfig(card.patch, card.image_size), 11)
    logits = []
    for write in (write_legacy_flat, write_nested_zip):
        path = write(tensors, tmp_path / f"{write.__name__}.pth")
        artifact = export_model(Workspace(tmp_path / write.__name__), alias, WeightsChoice(path))
        assert artifact.nodes <= 320
        assert artifact.bytes < 1.01 * path.stat().st_size
        images = sample_images(artifact.passport.preprocess, 2).pixels
        logits.append(OnnxRunner(artifact.path)(images))
        path.unlink()
        artifact.path.unlink()
        if alias != "clip-vit-base-p32":
            break  # the wrapping is the same code at every geometry: once is enough
    expected = reference_logits(tensors, images, patch=card.patch, heads=12, depth=12)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(logits[0], logits[-1])
    # Only logits of a trained model's spread make the tolerance mean something.
    assert 0.5 < expected.std() < 5
