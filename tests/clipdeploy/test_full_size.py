"""ViT-B itself, at each of its five geometries, from files in the published layouts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import write_legacy_flat, write_nested_zip
from reference_vit import reference_logits
from torch import Tensor

from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Precision
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice, random_tensors
from clipdeploy.models.vit import ViTConfig
from clipdeploy.pipeline import (
    BuildConfig,
    CalibrateConfig,
    build_model,
    export_model,
    sample_images,
)
from clipdeploy.runners import OnnxRunner
from clipdeploy.workspace.folder import Workspace
from exporters.onnx import ExportConfig

pytestmark = pytest.mark.slow

# float32 against float64 costs 4e-6 on these weights; tanh GELU, the smallest mistake, 1e-3.
TOLERANCE = 1e-4

ONE_GPU = BuildConfig(compute_capability=("8.9",))
GEOMETRIES = [
    "clip-vit-base-p32",
    "clip-vit-base-p32-384px",
    "clip-vit-base-p32-448px",
    "clip-vit-base-p16",
    "clip-vit-base-p16-384px",
]


@pytest.mark.parametrize("alias", GEOMETRIES)
def test_both_wrappings_export_to_the_architecture_itself(alias: str, tmp_path: Path) -> None:
    card = cards.find(alias)
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


def _peak_megabytes(code: str, *words: str) -> float:
    """Run Python code as a process; the largest resident size that it had."""
    tail = "\nprint('\\n' + open('/proc/self/status').read())"
    done = subprocess.run(
        [sys.executable, "-c", code + tail, *words], capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("write", [write_legacy_flat, write_nested_zip])
def test_an_export_needs_little_memory(
    write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
) -> None:
    path = write(random_tensors(ViTConfig(16, 224), 3), tmp_path / "weights.pth")
    export = (
        "import sys; from pathlib import Path\n"
        "from clipdeploy.models.load import WeightsChoice\n"
        "from clipdeploy.pipeline import export_model\n"
        "from clipdeploy.workspace.folder import Workspace\n"
        "export_model(Workspace(Path(sys.argv[2])), 'clip-vit-base-p16', "
        "WeightsChoice(Path(sys.argv[1])))"
    )
    peak = _peak_megabytes(export, str(path), str(tmp_path / "artifacts"))
    torch_alone = _peak_megabytes("import torch")
    # The weights once in the checkpoint, once in ONNX Runtime for the parity check, and room for
    # torch.export: two and a half times.  Holding one copy more would be caught.
    assert peak < torch_alone + 2.5 * path.stat().st_size / 1e6


@pytest.mark.parametrize("opset", [17, 20, 23])
def test_no_opset_has_more_than_320_nodes(opset: int, tmp_path: Path) -> None:
    config = ExportConfig(opset)
    choice = WeightsChoice(random_seed=0)
    artifact = export_model(Workspace(tmp_path), "clip-vit-base-p32", choice, config=config)
    assert artifact.nodes <= 320


@pytest.mark.parametrize("alias", GEOMETRIES)
def test_tensorrt_builds_every_geometry_in_every_precision(alias: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    workspace = Workspace(tmp_path)
    name = cards.find(alias).name
    export_model(workspace, name, WeightsChoice(random_seed=0))
    data = cards.demo_file("calibration.zip")
    observed = {"data": data, "calibrate": CalibrateConfig(images=10)}
    bytes_each: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
    for precision, size in bytes_each.items():
        more: dict[str, Any] = observed if precision == "int8" else {}
        # For one GPU, since each costs a build of its own.
        engine = build_model(workspace, name, precision, ONE_GPU, **more)
        if precision != "fp32":
            # As clipdeploy.engines.roofline counts them; the demo's are in its tests.
            inner = {engine.passport.kernels[f"blocks.{block}"] for block in range(1, 11)}
            assert inner == {8 if precision == "fp16" else 10}
        # An engine holds the weights, 86 M of them.
        assert engine.passport.plan_bytes > 86e6 * size
        # Written in several pieces.
        assert engine.passport.hashes.plan == sha256_file(engine.path)
