"""Write docs/images/int8.svg: the measured effect of each step of the INT8 recipe.

    python scripts/int8_figure.py [FILE]

The models are the demo model and an equivalent one with the channel outliers of real CLIP ViTs
(``scripts/make_outlier_variants.py``), calibrated on the demo's calibration digits.  Left: channels
of one Linear's input, before and after smoothing.  Middle and right: SQNR of the logits on held-out
digits, with the steps enabled one after another, and with each range method.  The graphs are those
of ``quantize --cpu``, run with ONNX Runtime.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from make_outlier_variants import add_channel_outliers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from calibration.config import Effort, QuantizeConfig
from calibration.qdq import smooth
from calibration.ranges import RANGE_METHODS
from calibration.scheme import SchemeConfig
from calibration.table import CalibrationTable, load_table
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import Recipe
from clipdeploy.core.plots import inline_svg
from clipdeploy.imaging import iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import calibrate_model, export_model, quantize_model
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph
from exporters.metrics import sqnr_db
from exporters.samples import normalise
from exporters.session import OnnxSession

DEFAULT = Path(__file__).parents[1] / "docs" / "images" / "int8.svg"
LINEAR = "blocks.3.mlp.fc1"
IMAGES = 200
STEPS = {
    "min-max": SchemeConfig("minmax", False, False, False, False),
    "+ smoothing": SchemeConfig("minmax", True, False, False, False),
    "+ range by output error": SchemeConfig("auto", True, False, False, False),
    "+ GELU's shift": SchemeConfig("auto", True, True, False, False),
    "+ weight clip": SchemeConfig("auto", True, True, True, False),
    "+ bias correction": SchemeConfig(),
}
Replacements = dict[str, Callable[..., object]]
# What replaces the functions of a step to switch it off.
_MEASURING: Replacements = {"calibration.qdq.measure_settings": lambda *given, **options: {}}
_GELU: Replacements = {"calibration.qdq.fold_all_gelu": lambda *given: {}}
# Numbers of zero are worse than the nearest ones, which every Linear then keeps.
_ROUNDING: Replacements = {
    "calibration.fitting.round_weight": lambda weight, *given: np.zeros_like(weight),
    "calibration.fitting.check_gains": lambda gains: (),
}
# The steps of --effort best, each with the later ones that are switched off in its row.
BEST: dict[str, Replacements] = {
    "+ biases through depth": _MEASURING | _GELU | _ROUNDING,
    "+ rounding on data": _MEASURING | _GELU,
    "+ GELU's scale per channel": _MEASURING,
    "+ measured smoothing": {},
}
METHODS = {method: SchemeConfig(method) for method in RANGE_METHODS}
COLOURS = {"demo": "#0072B2", "with outliers": "#D55E00"}


@dataclass(frozen=True)
class Measured:
    """Results of one model: channels before and after smoothing, dB by step and by method."""

    before: NDArray[np.float64]
    after: NDArray[np.float64]
    steps: dict[str, float]
    methods: dict[str, float]


def digits() -> NDArray[np.float32]:
    """Return held-out digits, normalised, (IMAGES, 3, 32, 32)."""
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    chosen = select(open_images(cards.demo_file("test.zip")), IMAGES, seed=0)
    return normalise(np.stack([crop.pixels for crop in iter_crops(chosen, spec)]), spec)


def decibels(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the SQNR of ``found`` in dB, infinity where it equals ``reference``."""
    db = sqnr_db(reference, found)
    return float("inf") if db is None else db


def channels(
    workspace: Workspace, table: CalibrationTable
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return max |x| of each channel of LINEAR's input, before and after smoothing."""
    model = load_graph(workspace.graph(cards.DEMO, "fp32"))
    names = frozenset(name for name in table.statistics if name.startswith("blocks."))
    folding = smooth(model, table, names)[LINEAR]
    seen = table.of(LINEAR)
    ends = (seen.minimum.astype(np.float64), seen.maximum.astype(np.float64))
    after = [np.abs((end - folding.shift) / folding.scale) for end in ends]
    return seen.amax.astype(np.float64), np.maximum(*after)


@contextmanager
def replaced(functions: Replacements) -> Iterator[None]:
    """Replace functions by name."""
    with ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(patch(name, function))
        yield


def measure(folder: Path, weights: Path | None, images: NDArray[np.float32]) -> Measured:
    """Export, calibrate, and quantise with every scheme."""
    workspace = Workspace(folder)
    export_model(workspace, cards.DEMO, WeightsChoice(weights))
    calibrate_model(workspace, cards.DEMO, cards.demo_file("calibration.zip"))
    (reference,) = OnnxSession(workspace.graph(cards.DEMO, "fp32")).run(images)

    def fidelity(scheme: SchemeConfig, effort: Effort = "fast") -> float:
        config = QuantizeConfig(scheme=scheme, remainder="fp32", min_sqnr=None, effort=effort)
        graph = quantize_model(workspace, cards.DEMO, config, force=True).artifact.path
        (found,) = OnnxSession(graph, exact_int8=True).run(images)
        return decibels(reference, found)

    before, after = channels(workspace, load_table(workspace.calibration(cards.DEMO)))
    steps = {name: fidelity(scheme) for name, scheme in STEPS.items()}
    for name, off in BEST.items():
        with replaced(off):
            steps[name] = fidelity(SchemeConfig(), "best")
    methods = {name: fidelity(scheme) for name, scheme in METHODS.items()}
    return Measured(before, after, steps, methods)


def bars(axes: Axes, title: str, values: dict[str, dict[str, float]]) -> None:
    """Draw a labelled pair of bars per row."""
    names = list(next(iter(values.values())))
    for index, (model, found) in enumerate(values.items()):
        places = np.arange(len(names)) + (index - 0.5) * 0.38
        drawn = axes.barh(places, list(found.values()), 0.36, color=COLOURS[model], label=model)
        axes.bar_label(drawn, fmt="%.1f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel("logits, signal over error in dB", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw(models: dict[str, Measured]) -> Figure:
    """Draw the figure."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, found in models.items():
        left.plot(np.sort(found.before)[::-1], color=COLOURS[name], linestyle=":")
        left.plot(np.sort(found.after)[::-1], color=COLOURS[name], label=name)
    left.set_yscale("log")
    left.set_xlabel("channels, sorted", fontsize=8)
    left.set_title(f"max |x| into {LINEAR}\n(dotted: before smoothing)", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    left.spines[["top", "right"]].set_visible(False)
    bars(middle, "one step after the other", {n: m.steps for n, m in models.items()})
    bars(right, "by range method, all other steps on", {n: m.methods for n, m in models.items()})
    return figure


def main() -> None:
    """Measure both models, print the numbers and write the figure."""
    images = digits()
    models = {}
    with tempfile.TemporaryDirectory() as temporary:
        outliers = Path(temporary, "outliers.safetensors")
        tensors = load_file(cards.demo_file("weights.safetensors"))
        save_file(add_channel_outliers(tensors, seed=1), outliers)
        for name, weights in (("demo", None), ("with outliers", outliers)):
            models[name] = measure(Path(temporary, name), weights, images)
            for step, found in (models[name].steps | models[name].methods).items():
                print(f"{name:14}  {step:24} {found:5.1f} dB", flush=True)
    svg = inline_svg(draw(models), "int8")
    start = svg.index(">") + 1
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT
    write_atomic(target, (svg[:start] + white + svg[start:] + "\n").encode())


if __name__ == "__main__":
    main()
