"""Runs what only a machine with a GPU can show, and writes a table for a bug report.

    bash scripts/gpu_day.sh [--quick] [--only STEP ...] [--seconds 360] [--out gpu-day]

Every check is a subprocess with a time limit, so that one that fails or hangs stops no other one.
The steps, in the order in which they run:

    doctor    driver, CUDA's libraries, TensorRT; always runs, because the others need its answer
    demo      the demo model's graphs in FP16, INT8 and FP8, judged by `verify` on ONNX Runtime's
              CPU and CUDA providers: the same dB
    sums      scripts/bench/sums.py with each TensorRT: do INT8 sums overflow float16?
    engines   with each TensorRT: build FP16, INT8 and FP8 with two batch profiles, verify the
              engines by running them, and benchmark them, also as CUDA graphs
    tests     `pytest -m gpu`: the engine's runner, PyTorch, ONNX Runtime, clocks and kernel cache
    gemm      scripts/bench/gemm.py: cuBLAS in FP16 and INT8 beside the cost model
    vit       ViT-B/16 with random weights: graphs, engines, and their latency at batches 1, 8, 32

Without a GPU, what needs one is "not run", and the graphs are judged on the CPU.  OUT receives
table.md, table.json, and the output and log of each check.  The exit code is 0 if no check
failed, 1 if one did, 2 for a usage error; what was not run is counted apart, and is no pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpu_log import FailedError, Log, Row
from gpu_output import (
    BACKENDS,
    NO_GPU,
    counted,
    decibels,
    describe,
    facts,
    judged,
    latencies,
    read_engine,
    read_gemm,
    read_sums,
    troubles,
    verdicts,
)

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
DATA = ROOT / "clipdeploy" / "data" / "demo"
DEMO, VIT = "clip-vit-demo", "clip-vit-base-p16"
# The form of INT8's weight scales that each backend computes: docs/int8.md.
FORMS = {"tensorrt": "channel", "tensorrt-rtx": "ratio"}
# `quantize` options and name of each quantised graph of the demo.
QUANTISED = {
    "int8-channel": ("--weight-scales", "channel"),
    "int8-ratio": ("--weight-scales", "ratio"),
    "fp8-tensor": ("--fp8", "--weight-scales", "tensor"),
}
# Half of the test images, whose interval is wider than the default of 1 point.
JUDGED = ("--data", DATA / "test.zip", "--images", "250", "--max-drop", "4", "--force")
# For random weights, whose accuracy says nothing: less to compute.
FAST = {"FP8": ("--range", "minmax", "--no-weight-clip", "--no-bias-correction")}
FAST["INT8"] = (*FAST["FP8"], "--no-smooth")
TO_FP16 = """
import sys
from pathlib import Path
from clipdeploy.pipeline import convert_model
from clipdeploy.workspace.folder import Workspace
workspace = Workspace(Path(sys.argv[1]))
print(convert_model(workspace, sys.argv[2]).path)
"""
FP8_FROM = (8, 9)


@dataclass
class Day:
    """The run: its log, the folder of the workspaces, and what ``doctor`` found."""

    log: Log
    work: Path
    found: dict[str, Any] = field(default_factory=dict)
    ready: dict[str, bool] = field(default_factory=dict)

    @property
    def gpu(self) -> dict[str, Any] | None:
        """The first GPU's name and compute capability."""
        found: list[dict[str, Any]] = self.found.get("gpus") or []
        return found[0] if found else None

    @property
    def capability(self) -> tuple[int, ...]:
        """The GPU's compute capability, () without one."""
        return tuple(self.gpu["compute_capability"]) if self.gpu else ()

    @property
    def backends(self) -> list[str]:
        """The TensorRTs that are installed."""
        return [each for each in BACKENDS if self.found.get(each.replace("-", "_"))]

    def unfit(self, backend: str) -> str:
        """Why this machine cannot run engines of a backend; empty if it can."""
        if not self.gpu:
            return NO_GPU
        built_for = self.found[backend.replace("-", "_")].get("capabilities")
        here = ".".join(map(str, self.capability))
        if built_for and here not in built_for:
            return f"{backend} has no kernels for SM {here}: see its row of sums"
        return ""


def clipdeploy(*words: str | Path) -> list[str]:
    """A command of clipdeploy."""
    return [sys.executable, "-m", "clipdeploy", *map(str, words)]


def script(name: str, *words: str) -> list[str]:
    """A script beside this one."""
    return [sys.executable, str(BENCH / f"{name}.py"), *words]


def doctor(day: Day) -> None:
    """Find the GPU, and fill the facts above the table."""
    listed: list[str] = []

    def read_driver(output: str) -> str:
        listed.extend(output.splitlines())
        return "; ".join(listed)

    def read(output: str) -> str:
        report = json.loads(output)
        day.found = report["machine"]
        day.log.machine.update(facts(day.found))
        problems, wrong = troubles(report["findings"], day.backends)
        if listed and not day.gpu:
            problems, wrong = [f"finds no GPU, but nvidia-smi finds {listed[0]}", *problems], True
        if wrong:
            raise FailedError("; ".join(problems))
        return "; ".join([describe(day.gpu), *problems])

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lacks = "" if shutil.which(query[0]) else "there is no nvidia-smi"
    day.log.check("doctor", "driver", query, 30, read=read_driver, lacks=lacks)
    # With exit code 1 there is a report, whose reasons say more.
    words = clipdeploy("doctor", "--json")
    day.log.check("doctor", "clipdeploy doctor", words, 60, read=read, codes=(0, 1))


def prepare(day: Day, model: str, step: str) -> bool:
    """Export and calibrate a model, once; whether that worked."""
    if model not in day.ready:
        place = ("--workspace", day.work / model, "--quiet", "--json")
        # Four digits are enough for the latency of random weights.
        random, few = (("--random-init", "0"), ("--images", "4")) if model == VIT else ((), ())
        export = clipdeploy("export", "--model", model, *random, *place)
        images = clipdeploy("calibrate", "--data", DATA / "calibration.zip", *few, *place)
        day.ready[model] = day.log.check(step, "export", export, 90) and day.log.check(
            step, "calibrate", images, 90
        )
    return day.ready[model]


def folder_of(workspace: Path) -> Path:
    """The folder of the only model in a workspace."""
    (found,) = (each for each in workspace.iterdir() if (each / "fp32.onnx").exists())
    return found


def to_fp16(day: Day, model: str, step: str) -> bool:
    """Write the FP16 graph, which needs no TensorRT."""
    words = [sys.executable, "-c", TO_FP16, str(day.work / model), folder_of(day.work / model).name]
    return day.log.check(step, "FP16 graph", words, 90)


def demo(day: Day) -> None:
    """Judge the demo's graphs on both providers of ONNX Runtime."""
    if not prepare(day, DEMO, "demo"):
        day.log.skip("demo", "graphs", "export or calibrate failed")
        return
    made, workspace = day.work / "graphs", day.work / DEMO
    made.mkdir(exist_ok=True)
    if to_fp16(day, DEMO, "demo"):
        shutil.copy(workspace / DEMO / "fp16.onnx", made)
    for name, options in QUANTISED.items():
        words = clipdeploy("quantize", *options, "--workspace", workspace, "--quiet", "--json")
        if day.log.check("demo", f"{name} graph", words, 60):
            # The next form of the same precision replaces the workspace's graph.
            shutil.copy(workspace / DEMO / f"{name[:4].rstrip('-')}.onnx", made / f"{name}.onnx")
    graphs = [workspace / DEMO / "fp32.onnx", *sorted(made.iterdir())]
    place = ("--workspace", workspace, "--quiet", "--json")
    words = clipdeploy("verify", *graphs, *JUDGED, *place)
    on_cpu: dict[str, float] = {}

    def read_cpu(output: str) -> str:
        on_cpu.update(decibels(verdicts(output)))
        return judged(output, "(CPU")

    check = partial(day.log.check, "demo", words=words, limit=150, codes=(0, 3))
    check("verify on the CPU", read=read_cpu, more={"CUDA_VISIBLE_DEVICES": ""})
    read = partial(judged, runner="(CUDA)", beside=on_cpu)
    check("verify on CUDA", read=read, lacks="" if day.gpu else NO_GPU)


def sums(day: Day) -> None:
    """Ask each TensorRT whether INT8 sums overflow."""
    for backend in day.backends:
        words = script("sums", "--backend", backend, "--json")
        read = partial(read_sums, fit=not day.unfit(backend))
        day.log.check("sums", backend, words, 60, read=read, codes=(0, 1))
    if not day.backends:
        day.log.skip("sums", "INT8 sums", "no TensorRT is installed")


def engines_of(day: Day, model: str, backend: str, step: str, *more: str) -> Path | None:
    """Build a model's engines in a copy of its workspace; its folder if one was built."""
    place = day.work / f"{model}-{backend}"
    shutil.copytree(day.work / model, place, dirs_exist_ok=True)
    form = ("--weight-scales", FORMS[backend])
    precisions = {"FP16": ("--fp16",), "INT8": ("--int8", *form), "FP8": ("--fp8",)}
    built = []
    for name, options in precisions.items():
        too_old = name == "FP8" and day.capability and day.capability < FP8_FROM
        lacks = f"FP8 needs SM {FP8_FROM[0]}.{FP8_FROM[1]}" if too_old else ""
        if backend == "tensorrt" and not day.gpu:
            lacks = f"{NO_GPU}, which TensorRT needs to build"
        options += FAST.get(name, ()) if model == VIT else ()
        words = clipdeploy(
            "build-engine", *options, *more, "--backend", backend, "--workspace", place
        )
        words += ["--quiet", "--json"]
        read = partial(read_engine, precision=name.lower())
        built.append(
            day.log.check(step, f"{backend}: build {name}", words, 120, read=read, lacks=lacks)
        )
    return folder_of(place) if any(built) else None


def engines(day: Day) -> None:
    """Build, run, judge and measure the demo's engines."""
    if not day.backends:
        day.log.skip("engines", "build, verify, benchmark", "no TensorRT is installed")
    elif prepare(day, DEMO, "engines"):
        for backend in day.backends:
            engines_with(day, backend)
    else:
        day.log.skip("engines", "build, verify, benchmark", "export or calibrate failed")


def engines_with(day: Day, backend: str) -> None:
    """Build, run, judge and measure the demo's engines of one backend."""
    profiles = ("--profile", "1,1,4", "--profile", "5,16,32")
    folder = engines_of(day, DEMO, backend, "engines", *profiles)
    made = sorted(folder.glob("*.engine")) if folder else []
    lacks = day.unfit(backend) or ("" if made else "nothing was built")
    place = ("--workspace", day.work / f"{DEMO}-{backend}", "--quiet", "--json")
    check = partial(day.log.check, "engines", lacks=lacks)
    words = clipdeploy("verify", *made, *JUDGED, *place)
    runs_on = partial(judged, runner=f"{backend} ")
    check(f"{backend}: verify", words, 120, read=runs_on, codes=(0, 3))
    speed = clipdeploy("benchmark", *made, "--batch", "1,8,32", "--seconds", "0.5", *place)
    read = partial(latencies, runner=f"{backend} ")
    check(f"{backend}: benchmark", speed, 60, read=read)
    check(f"{backend}: CUDA graphs", [*speed, "--cuda-graph"], 60, read=read)
    if backend == "tensorrt":
        stripped(day, place, lacks)


def stripped(day: Day, place: Sequence[str | Path], lacks: str) -> None:
    """Build an engine without weights, and judge it with those of its graph."""
    build = ("--fp16", "--strip-weights", "--backend", "tensorrt")
    words = clipdeploy("build-engine", *build, *place)
    read = partial(read_engine, precision="fp16")
    check = partial(day.log.check, "engines", lacks=lacks)
    if check("tensorrt: build without weights", words, 120, read=read):
        engine = day.work / f"{DEMO}-tensorrt" / DEMO / "fp16.engine"
        words = clipdeploy("verify", engine, *JUDGED, *place)
        judge = partial(judged, runner="tensorrt ")
        check("tensorrt: verify after refit", words, 60, read=judge, codes=(0, 3))


def tests(day: Day) -> None:
    """Run the tests that are marked ``gpu``."""
    report = day.log.folder.resolve() / "tests.xml"
    report.unlink(missing_ok=True)
    files = sorted(
        str(path)
        for path in (ROOT / "tests").rglob("test_*.py")
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
    )
    options = ("-m", "gpu and not slow", "-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    words = [sys.executable, "-m", "pytest", *options, *files]
    lacks = "" if importlib.util.find_spec("pytest") else "pytest is not installed"

    def read(output: str) -> str:
        return counted(report.read_text(encoding="utf-8"), bool(day.gpu))

    # With exit code 1 the report names the tests that failed.
    day.log.check("tests", "pytest -m gpu", words, 150, read=read, codes=(0, 1), lacks=lacks)


def gemm(day: Day) -> None:
    """Measure cuBLAS."""
    lacks = "" if day.gpu else NO_GPU
    day.log.check("gemm", "cuBLAS", script("gemm", "--json"), 90, read=read_gemm, lacks=lacks)


def vit(day: Day) -> None:
    """Measure ViT-B/16 with random weights."""
    if not day.gpu:
        day.log.skip("vit", "graphs, engines, benchmark", NO_GPU)
    elif not prepare(day, VIT, "vit"):
        day.log.skip("vit", "graphs, engines, benchmark", "export or calibrate failed")
    else:
        to_fp16(day, VIT, "vit")
        place = ("--workspace", day.work / VIT, "--quiet", "--json")
        for name, options in (("INT8", ("--weight-scales", "ratio")), ("FP8", ("--fp8",))):
            words = clipdeploy("quantize", *options, *FAST[name], *place)
            day.log.check("vit", f"{name} graph", words, 120)
        speed(day, "vit", "graphs on CUDA", day.work / VIT, "*.onnx", "(CUDA)")
        for backend in day.backends:
            if not (lacks := day.unfit(backend)):
                engines_of(day, VIT, backend, "vit")
                speed(
                    day,
                    "vit",
                    f"{backend} engines",
                    day.work / f"{VIT}-{backend}",
                    "*.engine",
                    backend,
                )
            else:
                day.log.skip("vit", f"{backend} engines", lacks)


def speed(day: Day, step: str, check: str, workspace: Path, pattern: str, runner: str) -> None:
    """Measure the artifacts of a workspace."""
    found = sorted(folder_of(workspace).glob(pattern))
    files = [path for path in found if path.stem != "fp32"]
    words = clipdeploy(
        "benchmark", *files, "--batch", "1,8,32", "--seconds", "1", "--quiet", "--json"
    )
    read = partial(latencies, runner=runner)
    lacks = "" if files else "nothing was built"
    day.log.check(step, check, words, 90, read=read, lacks=lacks)


STEPS: dict[str, Callable[[Day], None]] = {
    "demo": demo,
    "sums": sums,
    "engines": engines,
    "tests": tests,
    "gemm": gemm,
    "vit": vit,
}
QUICK = ("demo",)


def revision() -> str:
    """The version of this source tree, and its commit if there is one."""
    source = (ROOT / "clipdeploy" / "core" / "version.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "(.+)"', source)
    commit = ""
    with suppress(OSError):
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return " ".join(filter(None, (found and found[1], commit)))


def environment(work: Path) -> dict[str, str]:
    """The environment of every check: this source tree, no settings, and a cache of its own."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    ours = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "CLIPDEPLOY_OFFLINE": "1",
        "CLIPDEPLOY_CONFIG": os.devnull,
        "CLIPDEPLOY_HOME": str(work / "home"),
        "CLIPDEPLOY_WORKSPACE": str(work / "artifacts"),
    }
    return {**os.environ, **ours}


def run_steps(day: Day, steps: Sequence[str]) -> None:
    """Run ``doctor`` and the steps; one that breaks off is a failed check."""
    doctor(day)
    for name in steps:
        if not day.found:
            day.log.skip(name, "all", "doctor did not say what this machine has")
            continue
        try:
            STEPS[name](day)
        # Whatever it is, the other steps still run.
        except Exception as error:
            day.log.add(Row(name, "all", "failed", 0.0, f"{type(error).__name__}: {error}"))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, metavar="STEP", default=[], help="run these steps"
    )
    parser.add_argument("--quick", action="store_true", help="run doctor and demo only")
    parser.add_argument(
        "--seconds", type=float, default=360, help="time for everything (default 360)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "gpu-day")),
        help="folder of the tables and logs (default $OUT, else gpu-day)",
    )
    parser.add_argument(
        "--work", type=Path, help="keep the models in this folder (default: a temporary one)"
    )
    return parser.parse_args()


def main() -> int:
    """Run everything; return the exit code."""
    chosen = arguments()
    steps = chosen.only or (QUICK if chosen.quick else tuple(STEPS))
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as temporary:
        work = (chosen.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        log = Log(chosen.out, chosen.seconds, environment(work))
        log.machine["clipdeploy"] = revision()
        try:
            run_steps(Day(log, work), steps)
        finally:
            log.write()
            print(f"\n{log.markdown()}\nThis table is {chosen.out / 'table.md'}.")
    return int(log.count("failed") > 0)


if __name__ == "__main__":
    raise SystemExit(main())
