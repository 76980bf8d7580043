"""Train a small ViT whose activations and weights have heavy tails, and show what INT8 makes of it.

    python scripts/train_heavy_tailed.py train [--epochs 40]
    python scripts/train_heavy_tailed.py table

Nothing is planted into trained weights, as in ``make_outlier_variants.py``: the outliers come from
the training.  It begins with norm gains that are log-normal (sigma 1) and weights with Student's t
distribution of 3 degrees of freedom, and goes on with a large learning rate and no weight decay, so
that nothing makes large weights small.  Data and split are those of the demo.

``train`` writes ``tests/calibration/data/heavy-tailed.safetensors``: timm's layout, float16, patch
4, 32 px, width 64, depth 4, 4 heads.  Test images are used for the final accuracy only, which must
be at least 97 %.  With one thread the bytes are reproducible.

``table`` prints, for each Linear of this model and of the demo on held-out digits, the kurtosis of
its input (3 if it is normal), and its largest channel's max |x| divided by the median channel's.
Then top-1 and the SQNR of the logits in INT8: min-max without smoothing, the default, the best.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from train_demo_checkpoint import REQUIRED_TOP1, pixels, read_digits, save, split, top1, train

from calibration.config import QuantizeConfig
from calibration.scheme import SchemeConfig
from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice, load_model, random_tensors
from clipdeploy.models.vit import VisionTransformer, ViTConfig
from clipdeploy.pipeline import (
    VerifyScope,
    calibrate_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.workspace.folder import Workspace

SEED = 20262
RATE = 3e-3
CONFIG = ViTConfig(patch=4, image_size=32, classes=10, width=64, depth=4, heads=4)
FILE = Path(__file__).resolve().parent.parent / "tests/calibration/data/heavy-tailed.safetensors"
# Clipdeploy's name for this geometry.
CARD = "vit-p4-32px-w64-d4-h4"
RECIPES = {
    "min-max": QuantizeConfig(
        scheme=SchemeConfig("minmax", False, False, False, False), min_sqnr=None
    ),
    "default": QuantizeConfig(min_sqnr=None),
    "best": QuantizeConfig(min_sqnr=None, effort="best"),
}


def heavy_tailed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Initial weights: log-normal gains, and Student's t where ``tensors`` are normal."""
    generator = np.random.default_rng(SEED)
    made = {}
    for name, value in tensors.items():
        shape = tuple(value.shape)
        if "norm" in name and name.endswith("weight"):
            made[name] = torch.from_numpy(np.exp(generator.normal(size=shape))).float()
        elif name.startswith("blocks.") and value.ndim == 2:
            # Of variance 1: that of Student's t is 3.
            noise = generator.standard_t(3, size=shape) / 3**0.5
            made[name] = torch.from_numpy(noise).float() * value.std()
        else:
            made[name] = value
    return made


def new_model() -> VisionTransformer:
    """The network with its initial weights."""
    tensors = heavy_tailed(random_tensors(CONFIG, SEED))
    tensors["position"] = tensors.pop("pos_embed") + 0 * tensors.pop("cls_token")
    tensors["patch_embed.weight"] = tensors.pop("patch_embed.proj.weight")
    model = VisionTransformer(CONFIG)
    model.load_state_dict(tensors)
    return model


def train_and_write(epochs: int) -> int:
    """Train, and write the weights unless the model is too inaccurate."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    training, _, test = split(read_digits())
    model = new_model()
    labels = torch.from_numpy(training.labels)
    train(model, pixels(training, spec), labels, epochs, rate=RATE, decay=0.0)
    score = top1(model.half().float(), pixels(test, spec), torch.from_numpy(test.labels))
    print(f"top-1 on {len(test.labels)} held-out digits: {score:.2f} %")
    if score < REQUIRED_TOP1:
        print(f"below the required {REQUIRED_TOP1} %: nothing written", file=sys.stderr)
        return 1
    FILE.parent.mkdir(parents=True, exist_ok=True)
    save(model.half(), FILE)
    return 0


def tails(model: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """Kurtosis of the input of each Linear in a block, and its largest channel ratio."""
    found = {}

    def measure(name: str, x: Tensor) -> None:
        channels = x.double().flatten(0, -2)
        apart = channels - channels.mean()
        kurtosis = float(apart.pow(4).mean() / apart.pow(2).mean() ** 2)
        largest = channels.abs().amax(0)
        found[name] = (kurtosis, float(largest.max() / largest.median()))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            module.register_forward_pre_hook(lambda _, x, name=name: measure(name, x[0]))
    with torch.inference_mode():
        model(images)
    return found


def print_tails() -> None:
    """Print the tails of both models, by role: the largest of all blocks, and the median."""
    images = pixels(split(read_digits())[2], cards.find(cards.DEMO).preprocess(Recipe()))
    print(f"{'':14}{'':12}{'kurtosis':>16}{'channel ratio':>18}")
    print(f"{'':14}{'':12}{'median':>8}{'most':>8}{'median':>10}{'most':>8}")
    for title, card, file in (("demo", cards.DEMO, None), ("heavy-tailed", CARD, FILE)):
        loaded = load_model(cards.find(card), WeightsChoice(file), Recipe())
        found = tails(loaded.module, images)
        for role in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            pairs = np.asarray([pair for name, pair in found.items() if name.endswith(role)])
            middle, most = np.median(pairs, axis=0), pairs.max(axis=0)
            cells = f"{middle[0]:8.1f}{most[0]:8.1f}{middle[1]:10.1f}{most[1]:8.1f}"
            print(f"{title:14}{role:12}{cells}")


def calibrated(folder: Path) -> Workspace:
    """A workspace with the heavy-tailed model, exported and calibrated."""
    workspace = Workspace(folder)
    export_model(workspace, CARD, WeightsChoice(FILE))
    calibrate_model(workspace, CARD, cards.demo_file("calibration.zip"))
    return workspace


def int8_row(workspace: Workspace, config: QuantizeConfig) -> tuple[float, float, float]:
    """Top-1 of PyTorch and of INT8 in percent on the held-out digits, and the SQNR in dB."""
    quantize_model(workspace, CARD, config)
    scope = VerifyScope(graphs_only=True)
    found = verify_model(workspace, CARD, cards.demo_file("test.zip"), scope=scope).verification
    assert found is not None
    reference, row = found.reference, found.rows[-1].fidelity
    assert reference is not None
    assert row is not None
    assert row.accuracy is not None
    return reference.top1, row.accuracy.top1, row.sqnr_db or 0.0


def print_int8(folder: Path) -> None:
    """Print top-1 and SQNR of the heavy-tailed model with each recipe."""
    workspace = calibrated(folder)
    print(f"{'':14}{'PyTorch':>9}{'INT8':>9}{'dB':>8}")
    for name, config in RECIPES.items():
        reference, score, db = int8_row(workspace, config)
        print(f"{name:14}{reference:9.2f}{score:9.2f}{db:8.1f}", flush=True)


def main() -> int:
    """Train the model, or print what it is like."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("--epochs", type=int, default=40)
    chosen = parser.parse_args()
    if chosen.what == "train":
        return train_and_write(chosen.epochs)
    print_tails()
    with tempfile.TemporaryDirectory() as temporary:
        print_int8(Path(temporary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
