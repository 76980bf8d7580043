"""Compares calibration with other tools: seconds per image, fixed seconds, peak memory.

    PYTHONPATH=. python scripts/bench/calibrate.py [--model clip-vit-base-p16] [--large]

Each run is a separate process that makes an INT8 graph from the same FP32 graph and the first N of
the same images, decoded the same way.  Exceptions: the floor is only FP32 inference, one image at a
time, and "clipdeploy calibrate" stops after its table.  Runs are interleaved.  For each turn,
wall-clock seconds are fitted as

    t(N) = fixed + rate * N        "over floor" = rate - the floor's rate of the same turn

and the median over the turns is printed.  quantize_static is restricted to the block Linears that
clipdeploy quantises.  Memory is the peak resident size (VmHWM), including interpreter and
libraries.  A process that reaches 16 GB of address space is stopped and reported.  Tools that are
not installed (nncf, nvidia-modelopt) are listed and skipped.  The images are crops of
scikit-learn's two photographs.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from memory import peak_megabytes
from numpy.typing import NDArray
from PIL import Image

from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport
from exporters.samples import Samples

__all__ = [
    "EXPORT",
    "MAKERS",
    "NEEDS",
    "OURS",
    "Failure",
    "Job",
    "Maker",
    "Measurement",
    "QuantizerReader",
    "export",
    "inputs",
    "measured",
    "missing_peers",
    "prepare",
    "worker",
    "write_photos",
]

HERE = Path(__file__).resolve()
OURS = "clipdeploy"
CALIBRATE = "clipdeploy calibrate"
FLOOR = "floor: ORT FP32"
EXPORT = "export"
ADDRESS_SPACE = 16 * 10**9
_PEAK = "peak MB:"
_OUT_OF_MEMORY = re.compile(r"MemoryError|bad_alloc|[Ff]ailed to allocate|can't allocate memory")
_LINEAR = re.compile(r"^blocks\.\d+\.(attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)/MatMul$")


@dataclass(frozen=True)
class Job:
    """``images``: number of images; ``folder``: folder of images, workspace and ``target``."""

    model: str
    images: int
    folder: Path
    target: Path

    @property
    def workspace(self) -> Workspace:
        """The workspace of clipdeploy."""
        return Workspace(self.folder / "artifacts")

    @property
    def graph(self) -> Path:
        """The FP32 graph, the input of all tools."""
        return self.workspace.graph(self.model, "fp32")

    @property
    def photos(self) -> Path:
        """The folder of the calibration images."""
        return self.folder / "images"

    def words(self) -> list[str]:
        """The arguments of the worker process for this job."""
        files = [str(self.folder), str(self.target)]
        return ["--model", self.model, "--count", str(self.images), "--files", *files]


@dataclass(frozen=True)
class Measurement:
    """Wall-clock seconds and peak resident megabytes of one process."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Failure:
    """The reason why a process failed."""

    reason: str


Maker = Callable[[Job], None]


# Images ------------------------------------------------------------------------------------------


def _photo(sources: list[NDArray[np.uint8]], random: np.random.Generator) -> Image.Image:
    source = sources[random.integers(len(sources))]
    edges = [int(random.integers(160, limit + 1)) for limit in source.shape[:2]]
    top, left = (
        int(random.integers(limit - edge + 1))
        for limit, edge in zip(source.shape[:2], edges, strict=True)
    )
    crop = source[top : top + edges[0], left : left + edges[1]]
    bright = np.clip(crop * random.uniform(0.6, 1.4), 0, 255).astype(np.uint8)
    if random.random() < 0.5:
        bright = bright[:, ::-1]
    scale = random.uniform(0.8, 1.6)
    return Image.fromarray(bright).resize((int(edges[1] * scale), int(edges[0] * scale)))


def write_photos(folder: Path, count: int, seed: int) -> None:
    """Write ``count`` JPEG files: crops of two photographs, flipped, brightened and resized."""
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    sources = load_sample_images().images
    random = np.random.default_rng(seed)
    for index in range(count):
        _photo(sources, random).save(folder / f"{index:04}.jpg", quality=90)


def inputs(graph: Path, photos: Path, count: int) -> Iterator[NDArray[Any]]:
    """Return inputs (1, 3, S, S) of ``graph`` for the ``count`` images that clipdeploy selects."""
    passport = read_passport(graph)
    for crop in iter_crops(select(open_images(photos), count, seed=0), passport.preprocess):
        yield Samples(crop.pixels[None], passport.preprocess).as_input(passport.input)


# Workers -----------------------------------------------------------------------------------------


def export(job: Job) -> None:
    """Write the FP32 graph with random weights of seed 0."""
    from clipdeploy.models.load import WeightsChoice
    from clipdeploy.pipeline import export_model

    export_model(job.workspace, job.model, WeightsChoice(random_seed=0))


def _floor(job: Job) -> None:
    """Run FP32 inference, one image at a time."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(job.graph), providers=["CPUExecutionProvider"])
    for image in inputs(job.graph, job.photos, job.images):
        session.run(None, {"image": image})


def _calibrate(job: Job) -> None:
    """Run ``clipdeploy calibrate``."""
    from clipdeploy.pipeline import CalibrateConfig, calibrate_model

    config = CalibrateConfig(images=job.images)
    calibrate_model(job.workspace, job.model, job.photos, config, force=True)


def _ours(job: Job) -> None:
    """Run ``clipdeploy calibrate`` and ``clipdeploy quantize``."""
    from calibration.config import QuantizeConfig
    from clipdeploy.pipeline import quantize_model

    _calibrate(job)
    result = quantize_model(job.workspace, job.model, QuantizeConfig(remainder="fp32"), force=True)
    result.artifact.path.replace(job.target)


class QuantizerReader:
    """A CalibrationDataReader of onnxruntime for our images."""

    def __init__(self, job: Job) -> None:
        self._images = inputs(job.graph, job.photos, job.images)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """Return the next feed, ``None`` at the end."""
        image = next(self._images, None)
        return None if image is None else {"image": image}

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        """Return the reader, like onnxruntime's."""
        return iter(self.get_next, None)


def _linear_nodes(graph: Path) -> list[str]:
    """Return the MatMul nodes of the block Linears."""
    nodes = onnx.load(graph, load_external_data=False).graph.node
    return [node.name for node in nodes if _LINEAR.match(node.name)]


def _static(method: str) -> Maker:
    """Run quantize_static with one calibration method on the block Linears."""

    def make(job: Job) -> None:
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )

        quantize_static(
            str(job.graph),
            str(job.target),
            QuantizerReader(job),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=_linear_nodes(job.graph),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[method],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )

    return make


def _nncf(job: Job) -> None:
    """NNCF's transformer preset (SmoothQuant, bias correction), symmetric activations."""
    import nncf

    images = list(inputs(job.graph, job.photos, job.images))
    quantized = nncf.quantize(
        onnx.load(job.graph),
        nncf.Dataset(images, lambda image: {"image": image}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=job.images,
    )
    onnx.save(quantized, job.target)


def _modelopt(method: str) -> Maker:
    """nvidia-modelopt's ONNX quantiser with default options except the calibration method."""

    def make(job: Job) -> None:
        from modelopt.onnx.quantization import quantize

        images = np.concatenate(list(inputs(job.graph, job.photos, job.images)))
        quantize(
            onnx_path=str(job.graph),
            output_path=str(job.target),
            quantize_mode="int8",
            calibration_data={"image": images},
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
        )

    return make


MAKERS: dict[str, Maker] = {
    OURS: _ours,
    "quantize_static MinMax": _static("MinMax"),
    "quantize_static Entropy": _static("Entropy"),
    "quantize_static Percentile": _static("Percentile"),
    "nncf transformer": _nncf,
    "modelopt max": _modelopt("max"),
    "modelopt entropy": _modelopt("entropy"),
}
NEEDS = {"nncf transformer": "nncf", "modelopt max": "modelopt", "modelopt entropy": "modelopt"}


def missing_peers() -> dict[str, str]:
    """Return the tools that are not installed, with their packages."""
    return {name: need for name, need in NEEDS.items() if not importlib.util.find_spec(need)}


# Processes ---------------------------------------------------------------------------------------


def worker(maker: Maker, job: Job) -> None:
    """Run a job in this process with limited address space and print the peak memory."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    maker(job)
    print(f"{_PEAK} {peak_megabytes()}")


def _reason(stderr: str) -> str:
    if _OUT_OF_MEMORY.search(stderr):
        return f"out of memory at {ADDRESS_SPACE / 1e9:.0f} GB"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "ended without a word"


def measured(script: Path, name: str, job: Job) -> Measurement | Failure:
    """Run ``script --one name`` as a process."""
    words = [sys.executable, str(script), "--one", name, *job.words()]
    search = [str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    print(f"{name}, {job.images} images ...", end=" ", file=sys.stderr, flush=True)
    started = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s", file=sys.stderr)
    if done.returncode:
        return Failure(_reason(done.stderr))
    return Measurement(seconds, float(done.stdout.rpartition(_PEAK)[2]))


def prepare(script: Path, model: str, images: int, folder: Path) -> Job:
    """Write the calibration images and export the FP32 graph, in a separate process.

    Raises:
        SystemExit: the export failed.
    """
    # Files are named after the card; the given name may be an alias.
    job = Job(cards.find(model).name, images, folder, folder / "int8.onnx")
    write_photos(job.photos, images, seed=0)
    exported = measured(script, EXPORT, job)
    if isinstance(exported, Failure):
        raise SystemExit(f"the export failed: {exported.reason}")
    return job


# The table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The numbers of calibration images of each tool in each turn."""

    ours: tuple[int, ...]
    peers: tuple[int, ...]
    large: int | None
    repeat: int
    peer_repeat: int

    def counts(self, name: str, turn: int) -> tuple[int, ...]:
        """Return the numbers of images of ``name`` in ``turn``."""
        if name not in (FLOOR, CALIBRATE, OURS):
            return self.peers if turn < self.peer_repeat else ()
        large = (self.large,) if self.large and name == CALIBRATE and not turn else ()
        return (*self.ours, *large)

    @property
    def most(self) -> int:
        """The largest number of images."""
        return max(*self.ours, *self.peers, self.large or 0)


@dataclass
class Rows:
    """All measurements by tool, runs[name][turn][images], and failures."""

    runs: dict[str, dict[int, dict[int, Measurement]]]
    failures: dict[str, str]

    def line(self, name: str, turn: int) -> tuple[float, float] | None:
        """Return rate (s per image) and fixed seconds of a turn, None with fewer than two runs."""
        found = self.runs[name][turn]
        if len(found) < 2:
            return None
        rate, fixed = np.polyfit(list(found), [run.seconds for run in found.values()], 1)
        return float(rate), float(fixed)

    def peaks(self, name: str) -> dict[int, float]:
        """Return the largest peak memory of any turn, by number of images."""
        peaks: dict[int, float] = defaultdict(float)
        for runs in self.runs[name].values():
            for images, run in runs.items():
                peaks[images] = max(peaks[images], run.megabytes)
        return peaks


def measure_all(names: list[str], plan: Plan, job: Job) -> Rows:
    """Run all turns and numbers of images, alternating between the tools."""
    rows = Rows(defaultdict(lambda: defaultdict(dict)), {})
    for turn in range(max(plan.repeat, plan.peer_repeat)):
        wanted = sorted({count for name in names for count in plan.counts(name, turn)})
        for images in wanted:
            for name in names:
                if name in rows.failures or images not in plan.counts(name, turn):
                    continue
                found = measured(HERE, name, Job(job.model, images, job.folder, job.target))
                if isinstance(found, Failure):
                    rows.failures[name] = f"{found.reason}, with {images} images"
                else:
                    rows.runs[name][turn][images] = found
    return rows


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def print_rows(names: list[str], rows: Rows) -> None:
    """Print a row per tool."""
    counts = sorted({images for name in names for images in rows.peaks(name)})
    header = ("s/image", "over floor", "x floor", "fixed s", *(f"MB@{n}" for n in counts))
    print(f"{'':28}" + "".join(f"{word:>11}" for word in header))
    floor = {turn: rows.line(FLOOR, turn) for turn in rows.runs[FLOOR]}
    for name in names:
        pairs = [
            (line, base)
            for turn in rows.runs[name]
            if (line := rows.line(name, turn)) and (base := floor.get(turn))
        ]
        numbers = (
            f"{_median(line[0] for line, _ in pairs):.3f}",
            f"{_median(line[0] - base[0] for line, base in pairs):.3f}",
            f"{_median(line[0] / base[0] for line, base in pairs):.2f}",
            f"{_median(line[1] for line, _ in pairs):.1f}",
        )
        peaks: Mapping[int, float] = rows.peaks(name)
        memory = (f"{peaks[n]:.0f}" if n in peaks else "" for n in counts)
        print(f"{name:28}" + "".join(f"{word:>11}" for word in (*numbers, *memory)))


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="clip-vit-base-p16")
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 64, 128])
    parser.add_argument("--peer-images", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeat", type=int, default=3, help="turns of clipdeploy and the floor")
    parser.add_argument("--peer-repeat", type=int, default=1, help="turns of the peers")
    parser.add_argument("--large", action="store_true", help="clipdeploy with 512 images as well")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS))
    parser.add_argument(
        "--one", choices=[EXPORT, FLOOR, CALIBRATE, *MAKERS], help=argparse.SUPPRESS
    )
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=2, type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run everything and print the table."""
    chosen = _arguments().parse_args()
    if chosen.one:
        makers = {EXPORT: export, FLOOR: _floor, CALIBRATE: _calibrate, **MAKERS}
        worker(makers[chosen.one], Job(chosen.model, chosen.count, *chosen.files))
        return
    missing = missing_peers()
    names = [FLOOR, CALIBRATE, *(name for name in chosen.only if name not in missing)]
    plan = Plan(
        tuple(chosen.images),
        tuple(chosen.peer_images),
        512 if chosen.large else None,
        chosen.repeat,
        chosen.peer_repeat,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(HERE, chosen.model, plan.most, Path(folder))
        rows = measure_all(names, plan, job)
    print(f"{chosen.model}, random weights, {os.cpu_count()} cores")
    print_rows(names, rows)
    for name, reason in rows.failures.items():
        print(f"failed: {name}, {reason}")
    for name, need in missing.items():
        print(f"left out: {name}, {need} is not installed")


if __name__ == "__main__":
    main()
