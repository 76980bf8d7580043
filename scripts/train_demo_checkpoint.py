"""Train the demo's weights and pack its images, from scikit-learn's handwritten digits.

    python scripts/train_demo_checkpoint.py [--epochs 60]

Writes ``clipdeploy/data/demo/``: ``weights.safetensors`` in timm's layout, ``calibration.zip`` and
``test.zip`` (PNGs in class folders) and ``README.md``.  The split is fixed and its
parts are disjoint.  Test images are used for nothing but the final accuracy, which must be at least
97 %.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from clipdeploy.core.passport import Preprocess, Recipe
from clipdeploy.imaging.preprocess import crop_image
from clipdeploy.models import cards
from clipdeploy.models.load import random_tensors
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from exporters.samples import normalise

SEED = 20260
CALIBRATION, TEST = 200, 500
REQUIRED_TOP1 = 97.0
FOLDER = Path(__file__).resolve().parent.parent / "clipdeploy" / "data" / "demo"

README = """# The demo card's weights and images

- `calibration.zip`, `test.zip`: {calibration} and {test} handwritten digits, 8x8 grey PNGs in class
  folders; a further {train} trained the model. No image is in two parts: exact copies among the
  {total} were dropped first.
- `weights.safetensors`: a ViT (patch 4, 32 px, width 96, depth 6, 6 heads) in timm's layout,
  trained by `scripts/train_demo_checkpoint.py`; top-1 on `test.zip` after training: {top1:.2f} %.

The digits are the test part of *Optical Recognition of Handwritten Digits* by E. Alpaydin and
C. Kaynak (1998), UCI Machine Learning Repository, doi.org/10.24432/C50P49, licensed CC BY 4.0,
as distributed with scikit-learn (`sklearn.datasets.load_digits`). Changes: grey levels 0 to 16
were scaled to 0 to 255 and stored as PNG.
"""


@dataclass(frozen=True)
class Digits:
    """Images uint8 (N, 8, 8), labels (N,) and the index of each image in ``load_digits``."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def take(self, which: NDArray[np.int64]) -> Digits:
        """Return the chosen images."""
        return Digits(self.images[which], self.labels[which], self.index[which])


def read_digits() -> Digits:
    """Load scikit-learn's digits without duplicates."""
    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    kept = np.sort(first).astype(np.int64)
    return Digits(images[kept], raw.target[kept].astype(np.int64), kept)


def split(digits: Digits) -> tuple[Digits, Digits, Digits]:
    """Return (train, calibration, test), the latter two with equal numbers per class."""
    generator = np.random.default_rng(SEED)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in range(10):
        own = generator.permutation(np.flatnonzero(digits.labels == label))
        test, calibration = TEST // 10, CALIBRATION // 10
        parts[2].extend(own[:test])
        parts[1].extend(own[test : test + calibration])
        parts[0].extend(own[test + calibration :])
    train, calibrate, held_out = (digits.take(np.sort(np.asarray(p, np.int64))) for p in parts)
    return train, calibrate, held_out


def pack(digits: Digits, path: Path) -> None:
    """Write the digits as PNGs in class folders; the bytes are reproducible."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for image, label, index in zip(digits.images, digits.labels, digits.index, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", optimize=True)
            name = f"{label}/digit-{index:04d}.png"
            archive.writestr(zipfile.ZipInfo(name, (1998, 7, 1, 0, 0, 0)), buffer.getvalue())


def pixels(digits: Digits, spec: Preprocess) -> Tensor:
    """Preprocess the digits as in deployment, float32 (N, 3, 32, 32)."""
    crops = [crop_image(Image.fromarray(image).convert("RGB"), spec) for image in digits.images]
    return torch.from_numpy(normalise(np.stack(crops), spec))


def augment(images: Tensor) -> Tensor:
    """Rotate by up to 12 degrees, scale by up to 12 %, shift by up to 2.5 of 32 pixels."""
    count = len(images)
    angle = (torch.rand(count) * 2 - 1) * math.radians(12)
    scale = 1 + (torch.rand(count) * 2 - 1) * 0.12
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle) * scale
    matrix[:, 0, 1], matrix[:, 1, 0] = -torch.sin(angle) * scale, torch.sin(angle) * scale
    matrix[:, :, 2] = (torch.rand(count, 2) * 2 - 1) * (2.5 / 16)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def new_model(card: cards.ModelCard) -> VisionTransformer:
    """Build the demo network with seeded weights."""
    config = ViTConfig(
        card.patch, card.image_size, card.classes, card.width, card.depth, card.heads
    )
    model = VisionTransformer(config)
    tensors = random_tensors(config, SEED)
    tensors["position"] = tensors.pop("pos_embed") + 0 * tensors.pop("cls_token")
    tensors["patch_embed.weight"] = tensors.pop("patch_embed.proj.weight")
    model.load_state_dict(tensors)
    return model


def train(
    model: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    *,
    rate: float = 1e-3,
    decay: float = 0.05,
) -> None:
    """AdamW, one cosine cycle with a short warm-up, label smoothing."""
    batch, warmup = 64, 3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    steps = epochs * (len(images) // batch)
    warm = warmup * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    model.train()
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(images))
        for at in range(0, len(images) - batch + 1, batch):
            chosen = order[at : at + batch]
            loss = F.cross_entropy(
                model(augment(images[chosen])), labels[chosen], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s")


def top1(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Return top-1 in percent."""
    model.eval()
    with torch.inference_mode():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def save(model: VisionTransformer, path: Path) -> None:
    """Write the weights under timm's names; the class token includes position 0's row."""
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    position = tensors.pop("position")
    tensors["cls_token"] = position[:, :1].clone()
    position[:, :1] = 0
    tensors["pos_embed"] = position
    tensors["patch_embed.proj.weight"] = tensors.pop("patch_embed.weight")
    save_file(dict(sorted(tensors.items())), path)


def main() -> int:
    """Split, train, evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    card = cards.find(cards.DEMO)
    spec = card.preprocess(Recipe())
    digits = read_digits()
    training, calibration, test = split(digits)
    model = new_model(card)
    train(model, pixels(training, spec), torch.from_numpy(training.labels), epochs)
    score = top1(model, pixels(test, spec), torch.from_numpy(test.labels))
    print(f"top-1 on {len(test.labels)} held-out digits: {score:.2f} %")
    if score < REQUIRED_TOP1:
        print(f"below the required {REQUIRED_TOP1} %: nothing written", file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    save(model, FOLDER / "weights.safetensors")
    pack(calibration, FOLDER / "calibration.zip")
    pack(test, FOLDER / "test.zip")
    counts = {"train": training, "calibration": calibration, "test": test, "total": digits}
    text = README.format(**{k: len(v.labels) for k, v in counts.items()}, top1=score)
    (FOLDER / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
