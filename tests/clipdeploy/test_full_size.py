"""ViT-B itself, and each of its five geometries, from files in the published layouts.

The 12 blocks of a ViT-B are equal, and the five geometries differ in patches and tokens only: each
is tested with three blocks of half the width, and one of them as it is, too.
``scripts/bench/precisions.py kernels`` builds every card in full.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from checkpoint_files import write_legacy_flat, write_nested_zip
from reference_vit import reference_logits
from torch import Tensor

from clipdeploy.core.files import sha256_file
from clipdeploy.core.passport import Precision
from clipdeploy.models import cards
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.load import WeightsChoice, random_tensors
from clipdeploy.models.vit import ViTConfig
from clipdeploy.pipeline import (
    BuildConfig,
    CalibrateConfig,
    GraphArtifact,
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
WHOLE = {"depth": 12, "width": 768, "heads": 12}
# Heads of 64 channels, as in every CLIP.
SMALL = {"depth": 3, "width": 384, "heads": 6}
GEOMETRIES = {
    "whole": ("clip-vit-base-p32", WHOLE),
    "p32": ("clip-vit-base-p32", SMALL),
    "p32-384px": ("clip-vit-base-p32-384px", SMALL),
    "p32-448px": ("clip-vit-base-p32-448px", SMALL),
    "p16": ("clip-vit-base-p16", SMALL),
    "p16-384px": ("clip-vit-base-p16-384px", SMALL),
}
LINUX = sys.platform.startswith("linux")


# Prints the largest resident size so far.
PEAK = "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM:')))\n"


def _megabytes_beside_torch(code: str, *words: str) -> float:
    """Run Python code as a process; the memory that it had at most, beside torch itself."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch\n{PEAK}{IMPORTS}{code}{PEAK}", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    torch, peak = (int(kilobytes) for kilobytes in re.findall(r"VmHWM:\s+(\d+)", done.stdout))
    return (peak - torch) * 1024 / 1e6


IMPORTS = "import sys; from pathlib import Path; from clipdeploy.models.load import WeightsChoice\n"
EXPORT = """
from clipdeploy.pipeline import export_model
from clipdeploy.workspace.folder import Workspace
export_model(Workspace(Path(sys.argv[2])), 'clip-vit-base-p32', WeightsChoice(Path(sys.argv[1])))
"""


@dataclass(frozen=True)
class Exported:
    """A card exported from a checkpoint of these ``tensors``.  Engines may be added.

    ``megabytes``: the memory that it took, if it was exported by a process of its own.
    """

    card: ModelCard
    tensors: dict[str, Tensor]
    workspace: Workspace
    graph: GraphArtifact
    megabytes: float | None = None


Write = Callable[[dict[str, Tensor], Path], Path]


def export(card: ModelCard, tensors: dict[str, Tensor], write: Write, folder: Path) -> Exported:
    path = write(tensors, folder / f"{write.__name__}.pth")
    workspace = Workspace(folder / write.__name__)
    own = LINUX and card.depth == 12
    megabytes = _megabytes_beside_torch(EXPORT, str(path), str(workspace.root)) if own else None
    graph = export_model(workspace, card.name, WeightsChoice(path))
    assert graph.nodes <= 320 * card.depth / 12
    assert graph.bytes < 1.01 * path.stat().st_size
    path.unlink()
    return Exported(card, tensors, workspace, graph, megabytes)


@contextmanager
def changed(card: ModelCard, **fields: int) -> Iterator[ModelCard]:
    """The zoo with another geometry of ``card`` under its names."""
    other = replace(card, **fields)
    zoo = tuple(other if each == card else each for each in cards.all_cards())
    with mock.patch.object(cards, "all_cards", return_value=zoo):
        yield other


@pytest.fixture(scope="module", params=GEOMETRIES.values(), ids=GEOMETRIES.keys())
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exported]:
    name, sizes = request.param
    folder = tmp_path_factory.mktemp("exported")
    with changed(cards.find(name), **sizes) as card:
        tensors = random_tensors(ViTConfig(card.patch, card.image_size, **sizes), 11)
        yield export(card, tensors, write_legacy_flat, folder)
    shutil.rmtree(folder)


def test_both_wrappings_export_to_the_architecture_itself(
    exported: Exported, tmp_path: Path
) -> None:
    card, images = exported.card, sample_images(exported.graph.passport.preprocess, 2).pixels
    logits = OnnxRunner(exported.graph.path)(images)
    expected = reference_logits(
        exported.tensors, images, patch=card.patch, heads=card.heads, depth=card.depth
    )
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    # Only logits of a trained model's spread make the tolerance mean something.
    assert 0.5 < expected.std() < 5
    # The weights once in the checkpoint, once in ONNX Runtime for the parity check, and room for
    # torch.export: two and a half times.  Holding one copy more would be caught.
    if exported.megabytes is not None:
        assert exported.megabytes < 2.5 * exported.graph.bytes / 1e6
    # The wrapping is the same code at every geometry: once is enough.  The trace is shared.
    if card.depth == 3 and "clip-vit-base-p32" in card.aliases:
        other = export(card, exported.tensors, write_nested_zip, tmp_path)
        np.testing.assert_array_equal(OnnxRunner(other.graph.path)(images), logits)


READ = """
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import load_model
load_model(cards.find('clip-vit-base-p32'), WeightsChoice(Path(sys.argv[1])), Recipe())
"""


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_a_checkpoint_in_the_other_wrapping_needs_little_memory_too(tmp_path: Path) -> None:
    path = write_nested_zip(random_tensors(ViTConfig(32, 224), 3), tmp_path / "weights.pth")
    # The weights once, and half of them again: one copy more would be caught.  Only reading differs
    # between the files.
    assert _megabytes_beside_torch(READ, str(path)) < 1.5 * path.stat().st_size / 1e6


# Every export above is of the default, 20.
@pytest.mark.parametrize("opset", [17, 23])
def test_no_opset_has_more_than_320_nodes(opset: int, tmp_path: Path) -> None:
    config = ExportConfig(opset)
    choice = WeightsChoice(random_seed=0)
    # Narrow: the nodes do not depend on the width.
    with changed(cards.find("clip-vit-base-p32"), width=192):
        artifact = export_model(Workspace(tmp_path), "clip-vit-base-p32", choice, config=config)
    assert 200 < artifact.nodes <= 320


def test_tensorrt_builds_every_geometry_in_every_precision(exported: Exported) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    workspace, name = exported.workspace, exported.card.name
    data = cards.demo_file("calibration.zip")
    # One image: its ranges need not be good ones.
    observed = {"data": data, "calibrate": CalibrateConfig(images=1)}
    bytes_each: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
    if exported.card.depth == 12:
        # The others need the same kernels more often than three blocks do.
        bytes_each = {"int8": 1}
    for precision, size in bytes_each.items():
        more: dict[str, Any] = observed if precision == "int8" else {}
        # For one GPU, since each costs a build of its own.
        engine = build_model(workspace, name, precision, ONE_GPU, **more)
        if precision != "fp32":
            # As clipdeploy.engines.roofline counts them; the demo's are in its tests.
            last = exported.card.depth - 1
            inner = {engine.passport.kernels[f"blocks.{block}"] for block in range(1, last)}
            assert inner == {8 if precision == "fp16" else 10}
        # An engine holds the weights of the blocks, 7.1 M in each of ViT-B.
        weights = 7.0e6 * exported.card.depth * (exported.card.width / 768) ** 2
        assert engine.passport.plan_bytes > weights * size
        # Written in several pieces.
        assert engine.passport.hashes.plan == sha256_file(engine.path)
