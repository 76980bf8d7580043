"""Measures the effect of activation outliers on INT8: min-max, the default recipe, the best one.

    python scripts/bench/outliers.py [--variants FOLDER]

The models are the demo model and variants with the outliers of real CLIP ViTs, written by
``scripts/make_outlier_variants.py`` (about a minute; --variants takes a folder that it wrote).  For
each model: top-1 on the 500 held-out digits in PyTorch, and for each recipe top-1 and SQNR of the
logits against PyTorch.  The graphs are the ones from which TensorRT engines are compiled.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from calibration.config import QuantizeConfig
from calibration.scheme import SchemeConfig
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    Verification,
    VerifyScope,
    calibrate_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.workspace.folder import Workspace

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = {
    "min-max": QuantizeConfig(
        scheme=SchemeConfig("minmax", False, False, False, False), min_sqnr=None
    ),
    "default": QuantizeConfig(min_sqnr=None),
    "best": QuantizeConfig(min_sqnr=None, effort="best"),
}


def make_variants(folder: Path) -> None:
    """Run the script that writes the variants."""
    script = ROOT / "scripts" / "make_outlier_variants.py"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # The number of threads changes the order of sums, and so the fine-tuned weights.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    words = [sys.executable, str(script), "--out", str(folder)]
    subprocess.run(words, check=True, env=environment)


def judge(workspace: Workspace, config: QuantizeConfig) -> Verification:
    """Quantise with ``config`` and evaluate the graphs on the held-out digits."""
    quantize_model(workspace, cards.DEMO, config)
    test = cards.demo_file("test.zip")
    scope = VerifyScope(graphs_only=True)
    result = verify_model(workspace, cards.DEMO, test, scope=scope).verification
    assert result is not None
    return result


def main() -> None:
    """Create the variants, quantise each with every recipe and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.variants or Path(temporary, "variants")
        if chosen.variants is None:
            make_variants(folder)
        files = {"demo": None, **{path.stem: path for path in sorted(folder.glob("*.safetensors"))}}
        print(f"{'':10}{'PyTorch':>10}" + "".join(f"{name:>10}{'dB':>8}" for name in RECIPES))
        for name, file in files.items():
            workspace = Workspace(Path(temporary, name))
            export_model(workspace, cards.DEMO, WeightsChoice(file))
            calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
            cells = []
            for config in RECIPES.values():
                result = judge(workspace, config)
                found = result.rows[1].fidelity
                assert found is not None
                assert found.accuracy is not None
                assert result.reference is not None
                if not cells:
                    cells.append(f"{result.reference.top1:10.2f}")
                cells.append(f"{found.accuracy.top1:10.2f}{found.sqnr_db or 0:8.1f}")
            print(f"{name:10}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
