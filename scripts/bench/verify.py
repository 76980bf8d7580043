"""Compares verification of a fast model with decoding alone: images per second.

    python scripts/bench/verify.py [--images 12000] [--repeat 3] [--size 32]
    python scripts/bench/verify.py --memory 50000

Uses JPEGs of ImageNet's typical size (500 x 375 pixels, about 100 kB) and a ViT of one narrow
block.  At 32 pixels almost all work is image preparation; at 224 pixels PyTorch and ONNX Runtime
compete for the same cores.  Runs alternate between:

    pillow        only ``Image.open(path).convert("RGB")``, resize and crop, one process per
                  core
    plain loop    one process: Pillow image by image, then ONNX Runtime in batches
    verify        ``run_verification``: decode, PyTorch, the FP32 graph, records, results file
    verify --cache, again: crops and PyTorch's logits come from the cache

Ratios are relative to ``pillow``.  ``--memory N`` verifies N small images instead and prints the
peak resident size of this process and its decoding processes together.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from memory import peak_megabytes
from PIL import Image

from clipdeploy.core.passport import Passport, Preprocess, Recipe, TensorSpec
from clipdeploy.imaging import CropCache, ImageFolder, open_images
from clipdeploy.imaging.decoding import usable_cores
from clipdeploy.imaging.preprocess import crop_image, decode
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.load import LoadedModel, WeightsChoice, load_model
from clipdeploy.runners import OnnxRunner
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from exporters.headers import read_passport
from exporters.onnx import export_graph
from exporters.samples import Samples, normalise

# A large batch for a fast model.
BATCH = 64
# Edge of the crops, and of the patches: 16 tokens in either case.
PATCHES = {32: 8, 224: 56}


def card(size: int) -> ModelCard:
    """Build a ViT of one narrow block."""
    return ModelCard(
        name=f"narrow-vit-{size}px",
        aliases=(),
        patch=PATCHES[size],
        image_size=size,
        pretrain="",
        params=0,
        macs=0,
        top1=None,
        top5=None,
        file="",
        sha256_prefix="",
        timm_name="",
        timm_crop_pct=1.0,
        timm_crop_mode="center",
        classes=10,
        width=16,
        depth=1,
        heads=1,
    )


def jpeg(seed: int, width: int, height: int) -> bytes:
    """Draw smooth shapes with fine noise, compressed to the size of a photograph."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (12, 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noisy = smooth.astype(np.int16) + generator.normal(0, 20, smooth.shape).astype(np.int16)
    stream = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_images(folder: Path, count: int, width: int = 500, height: int = 375) -> ImageFolder:
    """Write ``count`` files of 100 different pictures; the bytes of all files differ."""
    pictures = [jpeg(seed, width, height) for seed in range(min(count, 100))]
    for number in range(count):
        path = folder / str(number % 10) / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bytes after the end of a JPEG are ignored by decoders.
        path.write_bytes(pictures[number % len(pictures)] + number.to_bytes(4, "big"))
    return open_images(folder)


def make_model(folder: Path, size: int) -> tuple[LoadedModel, Target]:
    """Create the model and its FP32 graph."""
    model = load_model(card(size), WeightsChoice(random_seed=0), Recipe())
    spec = model.card.preprocess(model.recipe)
    passport = Passport(
        kind="graph",
        model=model.card.name,
        precision="fp32",
        weights=model.weights,
        recipe=model.recipe,
        preprocess=spec,
        input=TensorSpec("image", "float32", ("batch", 3, size, size)),
        output=TensorSpec("logits", "float32", ("batch", model.card.classes)),
        classes=model.card.classes,
    )
    noise = np.random.default_rng(0).integers(0, 256, (7, size, size, 3), np.uint8)
    path = folder / f"narrow-{size}.fp32.onnx"
    export_graph(model.module, path, passport, Samples(noise, spec))
    return model, Target(path, "graph", read_passport(path))


def prepare(job: tuple[str, Preprocess]) -> int:
    """Decode, resize and crop one file, like torchvision's loader."""
    path, spec = job
    with Image.open(path) as image:
        return crop_image(image.convert("RGB"), spec).nbytes


def pillow_alone(images: ImageFolder, spec: Preprocess, stack: ExitStack) -> Callable[[], object]:
    """Prepare and discard images in one process per core, started before the measurement."""
    jobs = [(str(images.root / entry.name), spec) for entry in images.entries]
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(usable_cores()))
    pool.map(prepare, jobs[: 4 * usable_cores()])
    return lambda: sum(pool.imap_unordered(prepare, jobs, chunksize=16))


def plain_loop(images: ImageFolder, spec: Preprocess, graph: Path) -> Callable[[], object]:
    """Process images in one process without overlap."""
    runner = OnnxRunner(graph)

    def run() -> None:
        for start in range(0, len(images.entries), BATCH):
            names = [str(images.root / e.name) for e in images.entries[start : start + BATCH]]
            crops = [crop_image(decode(Path(n).read_bytes(), n), spec) for n in names]
            runner(normalise(np.stack(crops), spec))

    return run


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(images: ImageFolder, size: int, repeat: int, folder: Path) -> None:
    """Print the table of one crop size."""
    count = len(images.entries)
    model, target = make_model(folder, size)
    spec = target.passport.preprocess
    cache = CropCache(folder / "cache")

    def verify(kept: CropCache | None) -> Callable[[], object]:
        config = VerifyConfig(batch=BATCH, cache=kept)
        keep = folder / "verification.jsonl"

        def run() -> None:
            passport = target.passport
            run_verification(model, passport, [target], images, config, keep=keep, force=True)

        return run

    verify(cache)()
    with ExitStack() as stack:
        ways = {
            "pillow": pillow_alone(images, spec, stack),
            "plain loop": plain_loop(images, spec, target.path),
            "verify": verify(None),
            "verify --cache, again": verify(cache),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name, work in ways.items():
                rates[name].append(count / seconds(work))
    print(f"{f'crops of {size} pixels':24}{'images/s':>10}{'x pillow':>10}")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["pillow"], strict=True))
        print(f"{name:24}{statistics.median(found):10.0f}{ratio:10.2f}")


def resident(pids: list[int]) -> float:
    """Return the current resident megabytes of processes; ended ones count as zero."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def children() -> list[int]:
    """Return the child processes of this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):  # the process has ended
            # The name in parentheses may contain anything; state and parent follow it.
            parent = path.read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(path.parent.name))
    return found


def memory(count: int, folder: Path) -> None:
    """Verify ``count`` small images and print time and memory."""
    images = make_images(folder / "images", count, 48, 40)
    model, target = make_model(folder, max(PATCHES))
    largest = [0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.25):
            largest[0] = max(largest[0], resident([os.getpid(), *children()]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    keep = folder / "verification.jsonl"
    took = seconds(
        lambda: run_verification(
            model, target.passport, [target], images, VerifyConfig(batch=BATCH), keep=keep
        )
    )
    done.set()
    watcher.join()
    print(
        f"{count} images in {took:.0f} s, results {keep.stat().st_size / 1e6:.0f} MB, "
        f"peak {peak_megabytes():.0f} MB, with its decoding processes {largest[0]:.0f} MB"
    )


def main() -> None:
    """Run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--size", type=int, choices=PATCHES, help="of the crops; both if left out")
    parser.add_argument("--memory", type=int, metavar="N")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="clipdeploy-bench-"))
    try:
        if chosen.memory:
            memory(chosen.memory, folder)
        else:
            images = make_images(folder / "images", chosen.images)
            # The cache ignores time stamps younger than two seconds.
            time.sleep(2.1)
            size = sum((images.root / e.name).stat().st_size for e in images.entries)
            print(
                f"{chosen.images} JPEGs of {size / chosen.images / 1e3:.0f} kB, "
                f"{usable_cores()} cores, median of {chosen.repeat}"
            )
            for size in [chosen.size] if chosen.size else PATCHES:
                compare(images, size, chosen.repeat, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
