"""Compares the precisions: what each costs in accuracy, bytes and kernels.

    python scripts/bench/precisions.py accuracy [--variants FOLDER]
    python scripts/bench/precisions.py kernels [--model NAME ...] [--workspace FOLDER]

``accuracy``: the demo model and its variants with the outliers of real CLIP ViTs (``--variants``: a
folder that ``scripts/make_outlier_variants.py`` wrote, else they are made first).  For each: top-1
on the 500 held-out digits in PyTorch, then top-1 and the SQNR of the logits for FP16, INT8 and FP8,
the latter two also with attention quantised.  ONNX Runtime runs the graphs.

``kernels``: every model of the zoo with random weights, compiled by TensorRT-RTX, without a GPU,
for SM 8.9 and 12.0.  For each precision: megabytes of the plan, all kernels, and the most kernels
of one block.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from outliers import make_variants

from calibration.policy import Scope
from calibration.qdq import QuantizeConfig
from clipdeploy.core.passport import Precision
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.builder import build_engine
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    CalibrateConfig,
    VerifyScope,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.workspace.folder import Workspace

DIGITS = cards.demo_file("calibration.zip")
TARGETS = BuildConfig(backend="tensorrt-rtx", compute_capability=("8.9", "12.0"))
ATTENTION = Scope(attention=True)
CASES: dict[str, tuple[Precision, QuantizeConfig]] = {
    "FP16": ("fp16", QuantizeConfig()),
    "INT8": ("int8", QuantizeConfig(min_sqnr=None)),
    "INT8 + attention": ("int8", QuantizeConfig(min_sqnr=None, scope=ATTENTION)),
    "FP8": ("fp8", QuantizeConfig(min_sqnr=None, format="fp8")),
    "FP8 + attention": ("fp8", QuantizeConfig(min_sqnr=None, format="fp8", scope=ATTENTION)),
}


def write_graph(workspace: Workspace, model: str, case: str) -> Path:
    """Write the graph of ``case`` and return its path."""
    precision, config = CASES[case]
    if precision == "fp16":
        return convert_model(workspace, model).path
    return quantize_model(workspace, model, config, backend="tensorrt-rtx").artifact.path


def top1_and_sqnr(workspace: Workspace, graph: Path) -> tuple[float, float, float]:
    """Top-1 of PyTorch and of the demo's ``graph`` in percent, and the graph's SQNR in dB."""
    scope = VerifyScope(artifacts=(graph,))
    found = verify_model(workspace, cards.DEMO, cards.demo_file("test.zip"), scope=scope)
    assert found.verification is not None
    reference, fidelity = found.verification.reference, found.verification.rows[-1].fidelity
    assert reference is not None
    assert fidelity is not None
    assert fidelity.accuracy is not None
    return reference.top1, fidelity.accuracy.top1, fidelity.sqnr_db or 0.0


def print_accuracy(variants: Path | None, folder: Path) -> None:
    """Print the table of ``accuracy``."""
    if variants is None:
        variants = folder / "variants"
        make_variants(variants)
    files = {"demo": None, **{path.stem: path for path in sorted(variants.glob("*.safetensors"))}}
    print(f"{'':10}{'PyTorch':>10}" + "".join(f"{name:>18}{'dB':>7}" for name in CASES))
    for name, file in files.items():
        workspace = Workspace(folder / name)
        export_model(workspace, cards.DEMO, WeightsChoice(file))
        calibrate_model(workspace, cards.DEMO, DIGITS)
        cells, reference = [], 0.0
        for case in CASES:
            graph = write_graph(workspace, cards.DEMO, case)
            reference, top1, db = top1_and_sqnr(workspace, graph)
            cells.append(f"{top1:18.1f}{db:7.1f}")
        print(f"{name:10}{reference:10.1f}{''.join(cells)}", flush=True)


def print_kernels(models: list[str], workspace: Workspace) -> None:
    """Print the table of ``kernels``."""
    print(f"{'':24}" + "".join(f"{name:>18}" for name in CASES))
    print(f"{'':24}" + f"{'MB':>7}{'all':>5}{'block':>6}" * len(CASES))
    for model in models:
        export_model(workspace, model, WeightsChoice(random_seed=0))
        calibrate_model(workspace, model, DIGITS, CalibrateConfig(images=4))
        cells = []
        for case, (precision, _) in CASES.items():
            graph = write_graph(workspace, model, case)
            made = build_engine(graph, workspace.engine(model, precision), TARGETS).passport
            blocks = [n for name, n in made.kernels.items() if name.startswith("blocks.")]
            total = sum(made.kernels.values())
            cells.append(f"{made.plan_bytes / 1e6:7.0f}{total:5}{max(blocks):6}")
        print(f"{model:24}{''.join(cells)}", flush=True)


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("accuracy", "kernels"))
    parser.add_argument("--variants", type=Path)
    parser.add_argument(
        "--model", nargs="+", default=[each.name for each in cards.all_cards() if not each.shipped]
    )
    parser.add_argument("--workspace", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.workspace or Path(temporary)
        if chosen.table == "accuracy":
            print_accuracy(chosen.variants, folder)
        else:
            print_kernels(chosen.model, Workspace(folder))


if __name__ == "__main__":
    main()
