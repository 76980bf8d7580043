"""Measure what the checks of the calibration images find, and how many images the ranges need.

    python scripts/bench/calibration_images.py ranges      how ranges settle with more images
    python scripts/bench/calibration_images.py sound       false alarms: digits and photographs
    python scripts/bench/calibration_images.py faults      images with faults

``ranges`` calibrates the demo on subsets of its 700 digits and prints how far the largest |x| of a
Linear's input is exceeded by the digits that were left out.  ``sound`` draws subsets of the digits,
and crops of scikit-learn's two photographs for a model with random weights.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from calibration.collect import ActivationCollector, CalibrationImage
from clipdeploy.core.errors import CalibrationError
from clipdeploy.imaging import iter_crops, open_images
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import CalibrateConfig, calibrate_model, export_model
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport
from exporters.samples import Samples

Pixels = NDArray[np.uint8]
Change = Callable[[Pixels], Pixels]
_COUNTS = (8, 16, 32, 64, 128, 256)
_SEEDS = 8


def digits(model: Workspace) -> list[CalibrationImage]:
    """Return the demo's 700 digits as inputs of its graph."""
    passport = read_passport(model.graph(cards.DEMO, "fp32"))
    spec = passport.preprocess
    return [
        CalibrationImage(
            f"{file}/{crop.entry.name}",
            crop.sha256,
            Samples(crop.pixels[None], spec).as_input(passport.input),
            crop=crop.pixels,
        )
        for file in ("calibration.zip", "test.zip")
        for crop in iter_crops(open_images(cards.demo_file(file)), spec)
    ]


def _largest(graph: Path, images: list[CalibrationImage]) -> dict[str, NDArray[np.float32]]:
    collector = ActivationCollector(graph)
    for image in images:
        collector.add(image)
    return {name: found.amax for name, found in collector.statistics().items()}


def ranges(model: Workspace) -> Iterator[str]:
    """Yield how far the ranges of N images are exceeded by other images."""
    everything = digits(model)
    graph = model.graph(cards.DEMO, "fp32")
    yield "images  range exceeded by (median, worst Linear)   channels exceeded by over 25 %"
    for count in _COUNTS:
        exceeded, channels = [], []
        for seed in range(_SEEDS):
            order = np.random.default_rng(seed).permutation(len(everything))
            chosen = [everything[i] for i in order[:count]]
            others = [everything[i] for i in order[-300:]]
            ours, theirs = _largest(graph, chosen), _largest(graph, others)
            exceeded.append([theirs[name].max() / ours[name].max() for name in ours])
            channels.append([np.mean(theirs[name] > 1.25 * ours[name]) for name in ours])
        over = 100 * (np.maximum(np.asarray(exceeded), 1) - 1)
        far = 100 * np.asarray(channels).mean()
        yield (
            f"{count:6}  {np.median(over.mean(axis=0)):5.1f} % {over.mean(axis=0).max():5.1f} %"
            f"                          {far:5.1f} %"
        )


def photographs(count: int, edge: int, seed: int, blur: float = 0) -> list[Pixels]:
    """Return random crops of scikit-learn's two photographs, uint8 (edge, edge, 3)."""
    from sklearn.datasets import load_sample_images

    sources = load_sample_images().images
    random = np.random.default_rng(seed)
    found = []
    for index in range(count):
        source = sources[index % len(sources)]
        side = int(random.integers(120, source.shape[0]))
        top, left = (int(random.integers(limit - side)) for limit in source.shape[:2])
        part = Image.fromarray(source[top : top + side, left : left + side])
        part = part.resize((edge, edge), Image.Resampling.BICUBIC)
        part = part.filter(ImageFilter.GaussianBlur(blur)) if blur else part
        found.append(np.asarray(part))
    return found


def _write(folder: Path, pictures: list[Pixels]) -> Path:
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:04}.png")
    return folder


def _digit_pixels() -> list[Pixels]:
    return [
        np.asarray(Image.open(archive.open(name)).convert("L"))
        for file in ("calibration.zip", "test.zip")
        for archive in (zipfile.ZipFile(cards.demo_file(file)),)
        for name in sorted(archive.namelist())
        if name.endswith(".png")
    ]


def found_in(model: Workspace, pictures: list[Pixels]) -> list[str]:
    """Return what ``calibrate`` says about ``pictures``."""
    with tempfile.TemporaryDirectory() as folder:
        data = _write(Path(folder) / "images", pictures)
        try:
            made = calibrate_model(
                model, cards.DEMO, data, CalibrateConfig(), keep=Path(folder) / "table.json"
            )
        except CalibrationError as error:
            return [f"refused: {error.message}"]
        return [f"{finding.kind}: {finding.sentence}" for finding in made.table.findings]


def _subset(pictures: list[Pixels], count: int, seed: int) -> list[Pixels]:
    order = np.random.default_rng(seed).permutation(len(pictures))
    return [pictures[i] for i in order[:count]]


def sound(trained: Workspace, random: Workspace) -> Iterator[str]:
    """Yield the number of sets of sound images with a finding."""
    for name, model, sets in (
        ("digits", trained, [_subset(_digit_pixels(), 160, seed) for seed in range(20)]),
        ("photographs, 64 px", random, [photographs(140, 64, seed) for seed in range(5)]),
        ("photographs, 256 px", random, [photographs(140, 256, seed) for seed in range(5)]),
    ):
        alarms = [found for found in (found_in(model, pictures) for pictures in sets) if found]
        yield f"{name}: {len(alarms)} of {len(sets)} sets with a finding {alarms or ''}"


def _enlarged(picture: Pixels, edge: int) -> Pixels:
    small = Image.fromarray(picture).resize((edge, edge), Image.Resampling.BOX)
    return np.asarray(small.resize(picture.shape[:2], Image.Resampling.BICUBIC))


FAULTS: dict[str, Change] = {
    "negatives": lambda x: 255 - x,
    "turned by 90 degrees": lambda x: np.rot90(x).copy(),
    "upside down": lambda x: x[::-1].copy(),
    "a quarter of the contrast": lambda x: (x // 4).astype(np.uint8),
    "bright and flat": lambda x: (200 + x // 8).astype(np.uint8),
    "of one colour": lambda x: np.full_like(x, int(x.mean())),
    "4 x 4 pixels": lambda x: np.asarray(Image.fromarray(x).resize((4, 4))),
    "blurred": lambda x: _enlarged(np.kron(x, np.ones((4, 4), np.uint8)), 2),
    "only red": lambda x: np.stack([x, 0 * x, 0 * x], axis=2),
    "thresholded": lambda x: np.where(x > 127, 255, 0).astype(np.uint8),
}


def faults(trained: Workspace) -> Iterator[str]:
    """Yield what is found in images with a fault."""
    pictures = _subset(_digit_pixels(), 160, 0)
    random = np.random.default_rng(0)
    sets = {name: [change(each) for each in pictures] for name, change in FAULTS.items()}
    sets["one class"] = _class(3)
    sets["16 digits"] = pictures[:16]
    sets["each digit twice"] = pictures[:130] * 2
    sets["noise of 8 x 8 pixels"] = list(random.integers(0, 256, (160, 8, 8), np.uint8))
    sets["noise of 32 x 32 pixels"] = list(random.integers(0, 256, (160, 32, 32, 3), np.uint8))
    sets["a fifth blank"] = [each * (i % 5 > 0) for i, each in enumerate(pictures)]
    sets["photographs"] = photographs(160, 64, 0)
    for name, images in sets.items():
        yield name
        yield from (f"    {line}" for line in found_in(trained, images) or ["NOTHING"])


def _class(digit: int) -> list[Pixels]:
    with zipfile.ZipFile(cards.demo_file("test.zip")) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"{digit}/")]
        return [np.asarray(Image.open(archive.open(name)).convert("L")) for name in names]


def main(part: str) -> None:
    """Print one part."""
    with tempfile.TemporaryDirectory() as folder:
        trained, random = (Workspace(Path(folder) / name) for name in ("trained", "random"))
        export_model(trained, cards.DEMO)
        export_model(random, cards.DEMO, WeightsChoice(random_seed=0))
        parts = {
            "ranges": lambda: ranges(trained),
            "sound": lambda: sound(trained, random),
            "faults": lambda: faults(trained),
        }
        for line in parts[part]():
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
