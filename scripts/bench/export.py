"""Compares exports with other tools: seconds, memory, nodes, bytes, ONNX Runtime latency.

    python scripts/bench/export.py [--model clip-vit-base-p16] [--repeat 3] [--only NAME ...]

Each export is a separate process from the same checkpoint file to an ONNX file: the command of
clipdeploy with all its checks, while the other tools trace timm's model and check nothing.  Runs
are interleaved, and every time is also printed as a ratio to clipdeploy's: above 1.00 the other
tool is slower.  "cpu s" are the seconds of all threads of the process, which other work on the
machine affects less; their ratio is the next column.  Tools that are not installed (onnxslim,
optimum with timm) are listed and skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from memory import peak_megabytes

from clipdeploy.models import cards
from clipdeploy.models.load import random_tensors
from clipdeploy.models.vit import ViTConfig

HERE = Path(__file__).resolve()
OURS = "clipdeploy"
PEAK = "peak MB:"


def config_of(model: str) -> ViTConfig:
    """Return the geometry of a model."""
    card = cards.find(model)
    return ViTConfig(card.patch, card.image_size, card.classes, card.width, card.depth, card.heads)


def export_ours(model: str, checkpoint: Path, target: Path) -> None:
    """Run ``clipdeploy export``, including checks and passport."""
    from clipdeploy.cli.main import main
    from clipdeploy.workspace.folder import Workspace

    workspace = Workspace(target.parent / "ours")
    words = ["export", "--model", model, "--checkpoint", str(checkpoint), "--quiet"]
    main([*words, "--workspace", str(workspace.root), "--force"], standalone_mode=False)
    workspace.graph(model, "fp32").replace(target)


def plain(model: str, checkpoint: Path) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return the plain model with the checkpoint's weights, and an example batch."""
    sys.path.insert(0, str(HERE.parent))
    from plain_vit import PlainViT

    config = config_of(model)
    with torch.device("meta"):
        module = PlainViT(config)
    tensors = torch.load(checkpoint, weights_only=True, mmap=True)
    module.load_state_dict(tensors, assign=True)
    return module.eval(), torch.zeros(2, 3, config.image_size, config.image_size)


def export_dynamo(model: str, checkpoint: Path, target: Path) -> None:
    """torch.onnx.export(dynamo=True)."""
    module, example = plain(model, checkpoint)
    torch.onnx.export(
        module,
        (example,),
        str(target),
        dynamo=True,
        opset_version=20,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )


def export_torchscript(model: str, checkpoint: Path, target: Path) -> None:
    """torch.onnx.export(dynamo=False)."""
    module, example = plain(model, checkpoint)
    torch.onnx.export(
        module,
        (example,),
        str(target),
        dynamo=False,
        opset_version=17,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
    )


def export_onnxslim(model: str, checkpoint: Path, target: Path) -> None:
    """torch.onnx.export(dynamo=True), then onnxslim."""
    import onnxslim

    export_dynamo(model, checkpoint, target)
    onnxslim.slim(str(target), str(target))


EXPORTERS: dict[str, Callable[[str, Path, Path], None]] = {
    OURS: export_ours,
    "torch.onnx dynamo": export_dynamo,
    "torch.onnx TorchScript": export_torchscript,
    "dynamo + onnxslim": export_onnxslim,
}
NEEDS = {"dynamo + onnxslim": "onnxslim"}


def measured(name: str, model: str, checkpoint: Path, target: Path) -> tuple[float, float, float]:
    """Run an exporter as a process; return seconds, CPU seconds and peak resident megabytes."""
    words = [sys.executable, str(HERE), "--one", name, "--model", model]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*words, "--files", str(checkpoint), str(target)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent.parent)},
    )
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, cpu, float(done.stdout.rpartition(PEAK)[2])


def latencies(files: dict[str, Path], size: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds of each round of FP32 inference, alternating between the graphs."""
    image = np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)
    sessions = {
        name: ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for name, path in files.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in files}
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {"image": image})
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="clip-vit-base-p16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=EXPORTERS, default=list(EXPORTERS))
    parser.add_argument(
        "--rounds", type=int, default=15, help="latency rounds; 0 measures no latency"
    )
    parser.add_argument("--one", choices=EXPORTERS, help=argparse.SUPPRESS)
    parser.add_argument("--files", nargs=2, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        EXPORTERS[chosen.one](chosen.model, *chosen.files)
        print(PEAK, peak_megabytes())
        return
    missing = [name for name, module in NEEDS.items() if not importlib.util.find_spec(module)]
    names = [name for name in EXPORTERS if name not in missing and name in (OURS, *chosen.only)]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "weights.pth")
        torch.save(random_tensors(config_of(chosen.model), 0), checkpoint)
        megabytes = checkpoint.stat().st_size / 1e6
        files = {name: Path(folder, f"{index}.onnx") for index, name in enumerate(names)}
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
        for _ in range(chosen.repeat):
            for name in names:
                runs[name].append(measured(name, chosen.model, checkpoint, files[name]))
        size = cards.find(chosen.model).image_size
        rounds = {b: max(chosen.rounds // b, 5) for b in (1, 8) if chosen.rounds}
        times = {b: latencies(files, size, b, count) for b, count in rounds.items()}
        print(f"{chosen.model}, checkpoint {megabytes:.0f} MB, {os.cpu_count()} cores")
        print("import torch alone:", f"{import_torch():.0f} MB")
        columns = ("s", "ratio", "cpu s", "ratio", "peak MB", "nodes", "MB", "batch 1", "batch 8")
        print("{:24}{:>7}{:>7}{:>7}{:>7}{:>9}{:>7}{:>7}{:>9}{:>9}".format("exporter", *columns))
        seconds = {name: statistics.median(s for s, _, _ in runs[name]) for name in names}
        cpu = {name: statistics.median(s for _, s, _ in runs[name]) for name in names}
        for name in names:
            ratio = [
                statistics.median(
                    a / b for a, b in zip(times[batch][name], times[batch][OURS], strict=True)
                )
                for batch in times
            ]
            nodes = len(onnx.load(files[name], load_external_data=False).graph.node)
            print(
                f"{name:24}{seconds[name]:7.1f}{seconds[name] / seconds[OURS]:7.2f}"
                f"{cpu[name]:7.1f}{cpu[name] / cpu[OURS]:7.2f}"
                f"{max(mb for _, _, mb in runs[name]):9.0f}{nodes:7}"
                f"{files[name].stat().st_size / 1e6:7.0f}"
                + "".join(f"{each:9.2f}" for each in ratio)
            )
    for name in missing:
        print(f"left out: {name}, {NEEDS[name]} is not installed")
    if not (importlib.util.find_spec("optimum") and importlib.util.find_spec("timm")):
        print("left out: optimum, it is not installed with timm")


def import_torch() -> float:
    """Return the peak resident megabytes of a process that only imports torch."""
    code = "import torch; from memory import peak_megabytes; print(peak_megabytes())"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=HERE.parent)
    return float(done.stdout)


if __name__ == "__main__":
    main()
