"""Compares INT8 graphs with those of other tools: fidelity, CPU latency, bytes.

    PYTHONPATH=. python scripts/bench/int8.py [--model clip-vit-base-p16] [--images 32]

clipdeploy writes two INT8 graphs: "quantize --cpu", with all other operators in FP32, for the
integer kernels of ONNX Runtime; and by default a graph for TensorRT with the other operators in
FP16.  No other tool writes the latter, and on a CPU it is slower than FP32 (see docs/int8.md).

Each tool makes its INT8 graph from the same FP32 graph and images in a separate process (see
calibrate.py).  On other images the logits are compared with the FP32 graph's:

    SQNR = 10 log10(sum logits^2 / sum (logits - fp32 logits)^2)  dB,  "worst" of any one image

Latency is that of ONNX Runtime on the CPU, alternating between the graphs in one process.  The
median of FP32 seconds / INT8 seconds per round is printed: above 1.00 the INT8 graph is faster.
Tools that are not installed (nncf, nvidia-modelopt) are listed and skipped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from calibrate import (
    EXPORT,
    MAKERS,
    OURS,
    Failure,
    Job,
    Maker,
    Measurement,
    QuantizerReader,
    export,
    inputs,
    measured,
    missing_peers,
    prepare,
    worker,
    write_photos,
)
from numpy.typing import NDArray

from exporters.metrics import sqnr_db

HERE = Path(__file__).resolve()
FP32 = "ONNX Runtime FP32"
BATCHES = (1, 8)


def _static_defaults(job: Job) -> None:
    """Run quantize_static with default options, on all operators that it supports."""
    from onnxruntime.quantization import quantize_static

    quantize_static(str(job.graph), str(job.target), QuantizerReader(job))


def _dynamic(job: Job) -> None:
    """Run quantize_dynamic with default options; it uses no images."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(job.graph), str(job.target))


def _ours(effort: Literal["fast", "best"], *, cpu: bool) -> Maker:
    """Run ``clipdeploy calibrate`` and ``clipdeploy quantize``, with --cpu and --effort."""

    def make(job: Job) -> None:
        from calibration.config import QuantizeConfig
        from clipdeploy.pipeline import CalibrateConfig, calibrate_model, quantize_model

        images = CalibrateConfig(images=job.images)
        calibrate_model(job.workspace, job.model, job.photos, images, force=True)
        config = QuantizeConfig(remainder="fp32" if cpu else "fp16", effort=effort)
        result = quantize_model(job.workspace, job.model, config, force=True)
        result.artifact.path.replace(job.target)

    return make


ALL: dict[str, Maker] = {
    f"{OURS} quantize --cpu": _ours("fast", cpu=True),
    "the same, --effort best": _ours("best", cpu=True),
    f"{OURS} quantize": _ours("fast", cpu=False),
    **{name: make for name, make in MAKERS.items() if name != OURS},
    "quantize_static defaults": _static_defaults,
    "quantize_dynamic": _dynamic,
}


@dataclass(frozen=True)
class Fidelity:
    """SQNR in dB over all images and of the worst one, and the share of equal top classes."""

    sqnr: float
    worst: float
    agreement: float

    def words(self) -> tuple[str, str, str]:
        """Return the cells of the table."""
        return f"{self.sqnr:.1f}", f"{self.worst:.1f}", f"{self.agreement:.2f}"


def session_of(path: Path) -> ort.InferenceSession:
    """Open a CPU session whose threads do not spin while another session is measured."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def logits_of(path: Path, images: list[NDArray[Any]]) -> NDArray[np.float64]:
    """Return logits (N, classes), computed one image at a time."""
    session = session_of(path)
    rows = [session.run(None, {"image": image})[0] for image in images]
    return np.concatenate(rows).astype(np.float64)


def _decibels(reference: NDArray[np.float64], logits: NDArray[np.float64]) -> float:
    db = sqnr_db(reference, logits)
    return float("inf") if db is None else db


def fidelity(reference: NDArray[np.float64], logits: NDArray[np.float64]) -> Fidelity:
    """Compare two (N, classes) arrays."""
    rows = zip(reference, logits, strict=True)
    return Fidelity(
        sqnr=_decibels(reference, logits),
        worst=min(_decibels(one, other) for one, other in rows),
        agreement=float((reference.argmax(axis=1) == logits.argmax(axis=1)).mean()),
    )


def latencies(
    files: dict[str, Path], image: NDArray[Any], batch: int, rounds: int
) -> dict[str, list[float]]:
    """Return seconds of each round, alternating between the graphs, after a warm-up round."""
    feed = {"image": np.repeat(image, batch, axis=0)}
    sessions = {name: session_of(path) for name, path in files.items()}
    taken: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feed)
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def make_all(names: list[str], job: Job) -> dict[str, Measurement | Failure]:
    """Run every tool, which writes ``target_of(job, name)``."""
    made: dict[str, Measurement | Failure] = {}
    for name in names:
        made[name] = measured(
            HERE, name, Job(job.model, job.images, job.folder, target_of(job, name))
        )
    return made


def target_of(job: Job, name: str) -> Path:
    """Return the path of a tool's graph."""
    return job.folder / f"{name.replace(' ', '-')}.onnx"


def _cost(run: Measurement | Failure | None) -> tuple[str, ...]:
    return (f"{run.seconds:.0f}", f"{run.megabytes:.0f}") if isinstance(run, Measurement) else ()


def print_table(
    files: dict[str, Path],
    made: dict[str, Measurement | Failure],
    judged: dict[str, Fidelity],
    times: dict[int, dict[str, list[float]]],
) -> None:
    """Print a row per graph."""
    judgements = ("SQNR dB", "worst", "agree")
    header = (*judgements, *(f"batch {b}" for b in times), "MB", "made s", "peak MB")
    print(f"{'':28}" + "".join(f"{word:>9}" for word in header))
    for name, path in files.items():
        ratios = [
            statistics.median(a / b for a, b in zip(taken[FP32], taken[name], strict=True))
            for taken in times.values()
        ]
        words = (
            *(judged[name].words() if name in judged else [""] * len(judgements)),
            *(f"{ratio:.2f}x" for ratio in ratios),
            f"{path.stat().st_size / 1e6:.1f}",
            *_cost(made.get(name)),
        )
        print(f"{name:28}" + "".join(f"{word:>9}" for word in words))
    for batch, taken in times.items():
        print(f"FP32, batch {batch}: {1e3 * statistics.median(taken[FP32]):.1f} ms")


def bench(names: list[str], job: Job, check: int, rounds: int) -> None:
    """Create, compare and time the graphs, and print the table."""
    write_photos(job.folder / "check", check, seed=1)
    made = make_all(names, job)
    good = [name for name in names if isinstance(made[name], Measurement)]
    files = {FP32: job.graph, **{name: target_of(job, name) for name in good}}
    images = list(inputs(job.graph, job.folder / "check", check))
    reference = logits_of(job.graph, images)
    judged = {name: fidelity(reference, logits_of(files[name], images)) for name in good}
    times = {b: latencies(files, images[0], b, max(rounds // b, 5)) for b in BATCHES}
    print(f"{job.model}, random weights, {job.images} calibration images, {check} others to judge")
    print_table(files, made, judged, times)
    for name, run in made.items():
        if isinstance(run, Failure):
            print(f"failed: {name}, {run.reason}")


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="clip-vit-base-p16")
    parser.add_argument("--images", type=int, default=32, help="calibration images")
    parser.add_argument("--check-images", type=int, default=16, help="images to judge with")
    parser.add_argument("--rounds", type=int, default=40, help="latency rounds at batch 1")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--one", choices=[EXPORT, *ALL], help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        makers = {EXPORT: export, **ALL}
        worker(makers[chosen.one], Job(chosen.model, chosen.count, *chosen.files))
        return
    missing = missing_peers()
    names = [name for name in chosen.only if name not in missing]
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(HERE, chosen.model, chosen.images, Path(folder))
        bench(names, job, chosen.check_images, chosen.rounds)
    print(f"{os.cpu_count()} cores, onnxruntime {ort.__version__}")
    for name, need in missing.items():
        print(f"left out: {name}, {need} is not installed")


if __name__ == "__main__":
    main()
