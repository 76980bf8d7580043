"""Creates graphs with a known fault in one Linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from calibration.collect import collect
from calibration.config import QuantizeConfig
from calibration.qdq import quantize
from calibration.table import CalibrationTable, save_table
from clipdeploy.imaging import open_images
from clipdeploy.models import cards
from clipdeploy.stages.calibrate import _calibration_images, _records
from exporters.headers import read_passport
from exporters.samples import Samples

Array = NDArray[Any]


def edit(source: Path, target: Path, edits: dict[str, Callable[[Array], Array]]) -> Path:
    """Copy a graph and change some of its weights with a function."""
    model = onnx.load(source)
    left = set(edits)
    for weight in model.graph.initializer:
        name = weight.name.removesuffix("/fp16")
        if name in left:
            left.remove(name)
            array = numpy_helper.to_array(weight)
            changed = edits[name](array).astype(array.dtype)
            weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    assert not left, left
    onnx.save(model, target)
    return target


def small_scale(source: Path, target: Path, linear: str) -> Path:
    """Make the step of a Linear's input 8 times too small."""
    return edit(source, target, {f"{linear}.input_scale": lambda step: step / 8})


def small_weight_scale(source: Path, target: Path, linear: str) -> Path:
    """Make all steps of a Linear's weight 8 times too small."""
    return edit(source, target, {f"{linear}.weight/scale": lambda step: step / 8})


def three_bits(source: Path, target: Path, linear: str) -> Path:
    """Round a Linear's weight to 3 bits: -3 to 3 instead of -127 to 127."""
    return edit(
        source,
        target,
        {f"{linear}.weight/int8": lambda w: np.clip(np.rint(w / 127 * 3), -3, 3) * (127 / 3)},
    )


def outlier_behind_gelu(source: Path, target: Path, block: int, size: float = 312.0) -> Path:
    """Create an equivalent FP32 graph with a constant channel of ``size`` in fc2's input.

    Scales cannot be folded through GELU.  GELU(size + h) = size + h for a large size, so the
    channel's weights times its mean are subtracted from fc2's bias.
    """
    fc1, fc2 = f"blocks.{block}.mlp.fc1", f"blocks.{block}.mlp.fc2"
    channel = 5
    held: dict[str, Array] = {}

    def keep(weight: Array) -> Array:
        held["row"] = weight[channel].astype(np.float64)
        return weight

    def raised(bias: Array) -> Array:
        bias = bias.copy()
        bias[channel] += size
        return bias

    edit(source, target, {f"{fc2}.weight": keep})
    return edit(
        target,
        target,
        {f"{fc1}.bias": raised, f"{fc2}.bias": lambda bias: bias - size * held["row"]},
    )


def calibrated(graph: Path, target: Path, images: int = 24) -> CalibrationTable:
    """Calibrate one of the demo's graphs on a few digits."""
    digits = open_images(cards.demo_file("calibration.zip"))
    few = type(digits)(digits.root, digits.entries[:: len(digits.entries) // images][:images])
    passport = read_passport(graph)
    table = collect(graph, lambda done: _calibration_images(few, passport, None), _records(few))
    return save_table(table, target)


def quantised(
    graph: Path,
    target: Path,
    samples: Samples,
    config: QuantizeConfig = QuantizeConfig(min_sqnr=None),
) -> Path:
    """Calibrate one of the demo's graphs on a few digits and quantise it, without limits."""
    table = target.with_suffix(".json")
    calibrated(graph, table)
    quantize(graph, table, target, samples, config)
    return target
