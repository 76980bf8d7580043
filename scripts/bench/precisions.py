"""Compares the precisions: what each costs in accuracy, bytes and kernels.

    python scripts/bench/precisions.py accuracy [--variants FOLDER] [--case NAME ...]
    python scripts/bench/precisions.py kernels [--model NAME ...] [--workspace FOLDER] [--case ...]

``accuracy``: the demo model and its variants with the outliers of real CLIP ViTs (``--variants``: a
folder that ``scripts/make_outlier_variants.py`` wrote, else they are made first).  For each: top-1
on the 500 held-out digits in PyTorch, then top-1 and the SQNR of the logits for FP16, INT8 and FP8,
the latter two also with attention (``attn``) and the sums of qkv and fc1 (``out``) in 8 bits, and
with ``--effort best`` (``best``).  ONNX Runtime runs the graphs.

``kernels``: every model of the zoo with random weights, compiled by TensorRT-RTX, without a GPU,
for SM 8.9 and 12.0.  For each precision: megabytes of the plan, all kernels, and the most kernels
of one block.  ``--case`` selects columns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from outliers import make_variants

from calibration.config import Effort, QuantizeConfig
from calibration.formats import FormatName
from calibration.policy import Scope
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
# ``INT8+attn+out`` -> what is in 8 bits besides the Linears; or the effort.
EXTRAS = ("", "+out", "+attn", "+attn+out", "+best")
CASES = ("FP16", *(f"{form}{extra}" for form in ("INT8", "FP8") for extra in EXTRAS))


def case_config(case: str) -> tuple[Precision, QuantizeConfig]:
    """The precision and configuration of a case."""
    form, *more = case.split("+")
    if form == "FP16":
        return "fp16", QuantizeConfig()
    name: FormatName = "int8" if form == "INT8" else "fp8"
    scope = Scope(attention="attn" in more, outputs="out" in more)
    effort: Effort = "best" if "best" in more else "fast"
    return name, QuantizeConfig(min_sqnr=None, format=name, scope=scope, effort=effort)


def write_graph(workspace: Workspace, model: str, case: str) -> Path:
    """Write the graph of ``case`` and return its path."""
    precision, config = case_config(case)
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


def print_accuracy(variants: Path | None, folder: Path, cases: list[str]) -> None:
    """Print the table of ``accuracy``."""
    if variants is None:
        variants = folder / "variants"
        make_variants(variants)
    files = {"demo": None, **{path.stem: path for path in sorted(variants.glob("*.safetensors"))}}
    print(f"{'':10}{'PyTorch':>10}" + "".join(f"{name:>14}{'dB':>6}" for name in cases))
    for name, file in files.items():
        workspace = Workspace(folder / name)
        export_model(workspace, cards.DEMO, WeightsChoice(file))
        calibrate_model(workspace, cards.DEMO, DIGITS)
        cells, reference = [], 0.0
        for case in cases:
            graph = write_graph(workspace, cards.DEMO, case)
            reference, top1, db = top1_and_sqnr(workspace, graph)
            cells.append(f"{top1:14.1f}{db:6.1f}")
        print(f"{name:10}{reference:10.1f}{''.join(cells)}", flush=True)


def print_kernels(models: list[str], workspace: Workspace, cases: list[str]) -> None:
    """Print the table of ``kernels``."""
    wide = max(map(len, models)) + 1
    print(" " * wide + "".join(f"{name:>16}" for name in cases))
    print(" " * wide + f"{'MB':>5}{'all':>5}{'block':>6}" * len(cases))
    for model in models:
        export_model(workspace, model, WeightsChoice(random_seed=0))
        calibrate_model(workspace, model, DIGITS, CalibrateConfig(images=4))
        cells = []
        for case in cases:
            graph, precision = write_graph(workspace, model, case), case_config(case)[0]
            made = build_engine(graph, workspace.engine(model, precision), TARGETS).passport
            blocks = [n for name, n in made.kernels.items() if name.startswith("blocks.")]
            total = sum(made.kernels.values())
            cells.append(f"{made.plan_bytes / 1e6:5.0f}{total:5}{max(blocks):6}")
        print(f"{model:{wide}}{''.join(cells)}", flush=True)


def main() -> None:
    """Print one of the two tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("accuracy", "kernels"))
    parser.add_argument("--variants", type=Path)
    parser.add_argument(
        "--model", nargs="+", default=[each.name for each in cards.all_cards() if each.width == 768]
    )
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.workspace or Path(temporary)
        if chosen.table == "accuracy":
            print_accuracy(chosen.variants, folder, chosen.case)
        else:
            print_kernels(chosen.model, Workspace(folder), chosen.case)


if __name__ == "__main__":
    main()
