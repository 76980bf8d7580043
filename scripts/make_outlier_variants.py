"""Create variants of the demo's weights with the activation outliers of full-size CLIP ViTs.

    python scripts/make_outlier_variants.py [--out outlier-variants]

Writes ``channels.safetensors``, ``massive.safetensors`` and ``both.safetensors`` in timm's layout.

``channels`` computes the same function as the demo.  With a factor f per channel, 1 for most,

    LayerNorm, Linear:  gamma -> f gamma,  beta -> f beta,  W[:, c] -> W[:, c] / f
    V, proj:            Wv[c] -> f Wv[c],  bv -> f bv,      W[:, c] -> W[:, c] / f

the latter because softmax(scores) @ v mixes tokens, not channels.

``massive`` adds a constant m of several hundred to two channels of the residual stream in an early
block.  The input of later LayerNorms is then x + m, with mean(m) = u, and S = sqrt(E[s^2] + var(m))
replaces each token's standard deviation s.  To first order

    gamma (x - mean(x)) / s = g (x + m - mean(x + m)) / S + g u / S,  g = gamma S E[1 / s]

in all other channels.  A short fine-tune on the training digits recovers what is lost: each token's
s and the two channels.  ``both`` is ``channels`` applied to ``massive``.

The number of epochs is fixed, and calibration and test digits are not used for training.  If a
variant lacks a required property the exit code is 1 and nothing is written.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_demo_checkpoint import Digits, new_model, pixels, read_digits, split, train

from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.vit import VisionTransformer

Tensors = dict[str, Tensor]

SEED = 20261
EPOCHS = 6
CHANNELS = 3
FACTORS = (20.0, 100.0)
MASSIVE_BLOCK = 1
MASSIVE_CHANNELS = 2
MASSIVE_BIAS = (400.0, 1200.0)
# The massive channels are about seven standard deviations from the mean in every later LayerNorm;
# trained networks have small gains there.
MASSIVE_GAIN = 0.02

REQUIRED_TOP1 = 98.0
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float64: 1e-9}
MASSIVE_RANGE = (300.0, 1400.0)
REQUIRED_RATIO = 10.0


@dataclass(frozen=True)
class Measured:
    """Measurements of a variant on N images.

    ``residual`` holds each channel's amax (width,) of the residual stream after each block.
    ``norm_ratios`` and ``v_ratios`` hold, for each LayerNorm or attention, the largest channel's
    amax divided by the median channel's: of the LayerNorm's output and of proj's input.
    """

    top1: float
    residual: tuple[Tensor, ...]
    norm_ratios: tuple[float, ...]
    v_ratios: tuple[float, ...]

    @property
    def largest(self) -> tuple[float, ...]:
        """Max |x| of the residual stream after each block."""
        return tuple(float(amax.max()) for amax in self.residual)


@dataclass(frozen=True)
class Variant:
    """A variant's weights, its measurements, and its difference from the parent if equivalent.

    ``difference`` maps the dtype of weights and arithmetic to the largest |logit - parent's|.
    """

    name: str
    tensors: Tensors
    measured: Measured
    difference: dict[torch.dtype, float]


def depth_of(tensors: Tensors) -> int:
    """Return the number of blocks."""
    return sum(name.endswith("mlp.fc2.bias") for name in tensors)


def add_channel_outliers(tensors: Tensors, seed: int) -> Tensors:
    """Scale a few output channels of each norm1, norm2 and V up, and down in the next Linear.

    The function stays the same.  The channels and their factors, log-uniform in ``FACTORS``, are
    drawn for each layer and depend on ``seed`` only, not on the tensors' dtype.
    """
    generator = np.random.default_rng(seed)
    made = {name: value.clone() for name, value in tensors.items()}
    width = made["norm.weight"].numel()

    def draw() -> Tensor:
        chosen = generator.choice(width, CHANNELS, replace=False)
        factors = torch.ones(width, dtype=torch.float64)
        factors[chosen] = torch.from_numpy(np.exp(generator.uniform(*np.log(FACTORS), CHANNELS)))
        return factors.to(made["norm.weight"].dtype)

    for index in range(depth_of(made)):
        block = f"blocks.{index}."
        for norm, linear in (("norm1", "attn.qkv"), ("norm2", "mlp.fc1")):
            factors = draw()
            made[f"{block}{norm}.weight"] *= factors
            made[f"{block}{norm}.bias"] *= factors
            made[f"{block}{linear}.weight"] /= factors
        factors = draw()
        made[f"{block}attn.qkv.weight"][2 * width :] *= factors[:, None]
        made[f"{block}attn.qkv.bias"][2 * width :] *= factors
        made[f"{block}attn.proj.weight"] /= factors
    return made


def norm_deviations(tensors: Tensors, images: Tensor) -> dict[str, Tensor]:
    """Return each token's standard deviation at the input of each LayerNorm, by its name."""
    model = build(tensors)
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.update({name: inputs[0].std(-1, unbiased=False)})

    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(keep(name))
    with torch.inference_mode():
        model(images)
    return found


def add_massive_channels(
    tensors: Tensors, images: Tensor, seed: int, block: int = MASSIVE_BLOCK
) -> Tensors:
    """Add a large constant to two residual channels after ``block`` and adapt the later norms.

    The function is kept only approximately: fine-tune the result.  ``images``, float32
    (N, 3, S, S), are training images on which the inputs of later LayerNorms are measured.  The
    signs of the constants alternate, so that the mean changes little; their sizes are uniform in
    ``MASSIVE_BIAS``.
    """
    generator = np.random.default_rng(seed)
    made = {name: value.clone() for name, value in tensors.items()}
    bias = made[f"blocks.{block}.mlp.fc2.bias"]
    chosen = torch.from_numpy(generator.choice(bias.numel(), MASSIVE_CHANNELS, replace=False))
    constant = torch.zeros_like(bias)
    sizes = generator.uniform(*MASSIVE_BIAS, MASSIVE_CHANNELS) * (-1) ** np.arange(MASSIVE_CHANNELS)
    constant[chosen] = torch.from_numpy(sizes).to(bias)
    bias += constant
    for name, deviation in norm_deviations(tensors, images).items():
        inside = re.match(r"blocks\.(\d+)\.", name)
        if name == "norm_pre" or (inside and int(inside[1]) <= block):
            continue
        per_unit = made[f"{name}.weight"] * (1 / deviation).mean()
        new_deviation = (deviation.square().mean() + constant.var(unbiased=False)).sqrt()
        gain = per_unit * new_deviation
        shift = per_unit * constant.mean()
        gain[chosen] = made[f"{name}.weight"][chosen] * MASSIVE_GAIN
        shift[chosen] = 0
        made[f"{name}.weight"] = gain
        made[f"{name}.bias"] += shift
    return made


def build(tensors: Tensors) -> VisionTransformer:
    """Build the demo network from ``tensors`` (timm's names), in their dtype, in eval mode."""
    state = dict(tensors)
    position = state.pop("pos_embed").clone()
    position[:, :1] += state.pop("cls_token")
    state["position"] = position
    state["patch_embed.weight"] = state.pop("patch_embed.proj.weight")
    model = new_model(cards.find(cards.DEMO)).to(position.dtype)
    model.load_state_dict(state)
    return model.eval()


def canonical(model: VisionTransformer) -> Tensors:
    """Return the weights of ``model`` under timm's names, with a separate class token."""
    made = {name: value.detach().clone() for name, value in model.state_dict().items()}
    position = made.pop("position")
    made["cls_token"] = position[:, :1].clone()
    position[:, :1] = 0
    made["pos_embed"] = position
    made["patch_embed.proj.weight"] = made.pop("patch_embed.weight")
    return made


def fine_tune(tensors: Tensors, images: Tensor, labels: Tensor, epochs: int) -> Tensors:
    """Train all weights for ``epochs``, like ``train_demo_checkpoint.py``."""
    model = build(tensors)
    train(model, images, labels, epochs)
    return canonical(model)


def measure(tensors: Tensors, images: Tensor, labels: Tensor) -> Measured:
    """Run ``images``, float32 (N, 3, S, S), and measure activations and accuracy."""
    model = build(tensors)
    residual: list[Tensor] = []
    norms: list[float] = []
    values: list[float] = []

    def amax(x: Tensor) -> Tensor:
        return x.abs().amax(dim=(0, 1))

    def ratio(x: Tensor) -> float:
        return float(amax(x).max() / amax(x).median())

    for block in model.blocks:
        block.register_forward_hook(lambda _module, _x, y: residual.append(amax(y)))
        block.attn.proj.register_forward_pre_hook(lambda _module, x: values.append(ratio(x[0])))
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda _module, _x, y: norms.append(ratio(y)))
    with torch.inference_mode():
        logits = model(images)
    score = 100 * float((logits.argmax(1) == labels).double().mean())
    return Measured(score, tuple(residual), tuple(norms), tuple(values))


def logit_difference(parent: Tensors, child: Tensors, images: Tensor) -> float:
    """Return the largest |logit - parent's| on ``images``, computed in the tensors' dtype."""
    with torch.inference_mode():
        images = images.to(parent["norm.weight"].dtype)
        return float((build(child)(images) - build(parent)(images)).abs().max())


def function_differences(parent: Tensors, seed: int, images: Tensor) -> dict[torch.dtype, float]:
    """Return ``logit_difference`` of the channel outliers in float32 and float64."""
    found = {}
    for dtype in LARGEST_DIFFERENCE:
        cast = {name: value.to(dtype) for name, value in parent.items()}
        found[dtype] = logit_difference(cast, add_channel_outliers(cast, seed), images)
    return found


def problems(variant: Variant) -> list[str]:
    """Return a sentence for each required property that ``variant`` lacks; NaN always fails."""
    found = []
    measured = variant.measured
    if not measured.top1 >= REQUIRED_TOP1:
        found.append(f"top-1 is {measured.top1:.2f} %, below {REQUIRED_TOP1} %")
    for dtype, difference in variant.difference.items():
        if not difference < LARGEST_DIFFERENCE[dtype]:
            limit = LARGEST_DIFFERENCE[dtype]
            found.append(f"logits differ by {difference:.1e} in {dtype}, not below {limit:.0e}")
    if variant.name in ("channels", "both"):
        for place, ratios in (("norm", measured.norm_ratios), ("V", measured.v_ratios)):
            if not min(ratios) >= REQUIRED_RATIO:
                found.append(f"a {place} has a channel ratio of only {min(ratios):.1f}")
    if variant.name in ("massive", "both"):
        low, high = MASSIVE_RANGE
        for index, amax in list(enumerate(measured.residual))[MASSIVE_BLOCK:]:
            if not (int((amax >= low).sum()) == MASSIVE_CHANNELS and float(amax.max()) <= high):
                largest = " ".join(f"{x:.0f}" for x in amax.topk(MASSIVE_CHANNELS + 1).values)
                found.append(
                    f"the largest channels after block {index} reach {largest}: not "
                    f"{MASSIVE_CHANNELS} in {low:.0f}..{high:.0f} and the others below"
                )
    return [f"{variant.name}: {sentence}" for sentence in found]


def table(variants: list[Variant]) -> str:
    """Return one row per variant; ratios are the largest of all blocks."""
    lines = [
        f"{'variant':<10}{'top-1 %':>8}{'dlogit f32':>12}{'dlogit f64':>12}{'norm ratio':>12}"
        f"{'V ratio':>9}{'max |x|':>9}  after each block"
    ]
    for variant in variants:
        measured = variant.measured
        apart = [variant.difference.get(dtype) for dtype in LARGEST_DIFFERENCE]
        cells = "".join(f"{'-' if value is None else f'{value:.1e}':>12}" for value in apart)
        sizes = " ".join(f"{size:.0f}" for size in measured.largest)
        lines.append(
            f"{variant.name:<10}{measured.top1:>8.2f}{cells}{max(measured.norm_ratios):>12.1f}"
            f"{max(measured.v_ratios):>9.1f}{max(measured.largest):>9.0f}  {sizes}"
        )
    return "\n".join(lines)


def held_back() -> set[int]:
    """Return the ``load_digits`` indices of the shipped calibration and test images."""
    found = set()
    for archive in ("calibration.zip", "test.zip"):
        with zipfile.ZipFile(cards.demo_file(archive)) as images:
            found |= {int(Path(name).stem.removeprefix("digit-")) for name in images.namelist()}
    return found


def make_variants(training: Digits, test: Digits, epochs: int) -> list[Variant]:
    """Create the parent, named ``demo``, and its three variants."""
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    train_images, train_labels = pixels(training, spec), torch.from_numpy(training.labels)
    images, labels = pixels(test, spec), torch.from_numpy(test.labels)

    def variant(name: str, tensors: Tensors, parent: Tensors | None = None) -> Variant:
        apart = {} if parent is None else function_differences(parent, SEED, images)
        return Variant(name, tensors, measure(tensors, images, labels), apart)

    demo = load_file(cards.demo_file("weights.safetensors"))
    planted = add_massive_channels(demo, train_images, SEED)
    massive = fine_tune(planted, train_images, train_labels, epochs)
    return [
        variant("demo", demo),
        variant("channels", add_channel_outliers(demo, SEED), demo),
        variant("massive", massive),
        variant("both", add_channel_outliers(massive, SEED), massive),
    ]


def main() -> int:
    """Create the variants, check them and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outlier-variants"))
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of the fine-tune")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    training, _, test = split(read_digits())
    if shared := held_back() & set(training.index.tolist()):
        print(f"{len(shared)} training digits are in the shipped archives", file=sys.stderr)
        return 1
    variants = make_variants(training, test, arguments.epochs)
    print(table(variants))
    if found := [sentence for variant in variants for sentence in problems(variant)]:
        print("\n".join([*found, "nothing written"]), file=sys.stderr)
        return 1
    arguments.out.mkdir(parents=True, exist_ok=True)
    for variant in variants[1:]:
        path = arguments.out / f"{variant.name}.safetensors"
        save_file(dict(sorted(variant.tensors.items())), path)
    print(f"{arguments.out}: three files, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
