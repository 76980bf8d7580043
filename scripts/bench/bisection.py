"""Measures how long a bisection of a full-size model takes.

    python scripts/bench/bisection.py [--model clip-vit-base-p16] [--images 32] [--workspace FOLDER]

The model has random weights of trained scale and is calibrated on a few of the demo's digits.  Its
INT8 graph is bisected with ONNX Runtime's CPU provider.  Prints seconds, peak memory and the
finding.  With --workspace graphs are kept in that folder and reused.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from memory import peak_megabytes

from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    BisectConfig,
    CalibrateConfig,
    Workspace,
    bisect_model,
    calibrate_model,
    export_model,
    quantize_model,
)

CALIBRATION_IMAGES = 8


def main() -> None:
    """Create the graphs, bisect and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="clip-vit-base-p16")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=BisectConfig().batch)
    parser.add_argument("--workspace", type=Path)
    chosen = parser.parse_args()
    name = cards.find(chosen.model).name
    with tempfile.TemporaryDirectory() as temporary:
        workspace = Workspace(chosen.workspace or Path(temporary))
        digits = cards.demo_file("calibration.zip")
        export_model(workspace, name, WeightsChoice(random_seed=0))
        calibrate_model(workspace, name, digits, CalibrateConfig(CALIBRATION_IMAGES))
        quantize_model(workspace, name)
        config = BisectConfig(chosen.images, batch=chosen.batch)
        started, cpu = time.perf_counter(), time.process_time()
        result = bisect_model(workspace, name, cards.demo_file("test.zip"), None, config)
        seconds = time.perf_counter() - started
        print(f"{name}, {chosen.images} images, {os.cpu_count()} cores")
        used = time.process_time() - cpu
        print(f"{seconds:.0f} s ({used:.0f} s of processor time), peak {peak_megabytes():.0f} MB")
        print(result.sentence)


if __name__ == "__main__":
    main()
