"""Corrects the scale of each output channel of the Linears too, and measures the effect.

    python scripts/bench/gains.py [--variants FOLDER]

``--effort best`` gives each output channel of a quantised Linear the FP32 network's mean by its
bias.  What is left of its error can also have a scale: with y the output in the FP32 network and y'
that in the network quantised so far, both centred, the gain of channel j with the least squared
error is

    g[j] = E[y y'] / E[y'^2],      s'[j] = float16(g[j] s[j]),      b'[j] = E[y] - E[x'] W'

and no node is needed, because the weight's scale s[j], or its ratio, takes it
(:mod:`calibration.write`).  The table: SQNR of the logits in dB on held-out digits for ``best``,
for ``best`` with gains in proj and fc2, whose outputs a block adds to the residual stream, and in
all Linears; then the median and the largest |g - 1|.  The graphs are those of ``quantize --cpu``,
with a given strength of smoothing, which saves the time to measure it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
from held_out import CALIBRATION, F32, decibels, demo_graphs, held_out_digits, logits
from numpy.typing import NDArray

from calibration import fitting
from calibration.config import QuantizeConfig
from calibration.formats import float16_scale
from calibration.policy import find_linears
from calibration.scheme import LinearScheme, SchemeConfig
from clipdeploy.models import cards
from clipdeploy.pipeline import calibrate_model, quantize_model
from clipdeploy.workspace.folder import Workspace
from exporters.initializers import values_of, write_initializer
from exporters.parts import run_part

F64 = NDArray[np.float64]
BEST = QuantizeConfig(
    scheme=SchemeConfig(strength=0.65), remainder="fp32", min_sqnr=None, effort="best"
)
SETS = {
    "best": (),
    "+ proj, fc2": ("attn.proj", "mlp.fc2"),
    "+ all": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
}


def least_squares_gain(exact: F32, coarse: F32) -> F64:
    """The gain (C,) of each channel of ``coarse`` (N, C) with the least error from ``exact``."""
    y, found = (each - each.mean(axis=0, dtype=np.float64) for each in (exact, coarse))
    power = np.square(found).sum(axis=0)
    return np.where(power > 0, (y * found).sum(axis=0) / np.maximum(power, 1e-30), 1.0)


class _GainPart(fitting._Part):
    """Fits gains in the Linears of ``roles`` after everything else, and collects them."""

    roles: Collection[str] = ()
    gains: list[F64]

    def run_exact(self, exact: ir.Model, inputs: Sequence[NDArray[Any]]) -> list[F32]:
        ends = super().run_exact(exact, inputs)
        sites = find_linears(exact)
        found = run_part(exact, [site.output for site in sites], inputs[: self._count])
        by_site = zip(*found, strict=True)
        self._outputs = {
            site.name: self._tokens(each) for site, each in zip(sites, by_site, strict=True)
        }
        return ends

    @staticmethod
    def _tokens(outputs: Sequence[F32]) -> F32:
        """The tokens (N, C) of all images; the class token as often as in the fitting."""
        rows = [each.reshape(-1, each.shape[-1]) for each in outputs]
        again = [np.repeat(each[:1], fitting._CLASS_TOKEN - 1, axis=0) for each in rows]
        return np.concatenate([*rows, *again])

    def fit(
        self, name: str, scheme: LinearScheme, inputs: Sequence[F32], correct_bias: bool
    ) -> tuple[LinearScheme, float]:
        scheme, fallen = super().fit(name, scheme, inputs, correct_bias)
        site = self._sites[name]
        if site.role not in self.roles:
            return scheme, fallen
        assert site.add is not None
        exact, images = self._outputs[name], inputs[: self._count]
        gain = least_squares_gain(exact, self._coarse_output(site.output, images))
        type(self).gains.append(gain)
        scale = float16_scale(scheme.weight_scale * gain)
        write_initializer(site.matmul, 1, scheme.numbers.astype(np.float32) * scale)
        means = (
            each.mean(axis=0, dtype=np.float64)
            for each in (exact, self._coarse_output(site.output, images))
        )
        off = np.subtract(*means)
        write_initializer(site.add, 1, (values_of(site.bias) + off).astype(np.float32))
        correction = scheme.correction + off
        return replace(scheme, weight_scale=scale, correction=correction), fallen

    def _coarse_output(self, value: ir.Value, images: Sequence[F32]) -> F32:
        return self._tokens([found for (found,) in run_part(self._coarse, [value], images)])


def measured(workspace: Workspace, roles: Collection[str], images: F32) -> tuple[F32, F64]:
    """The logits of ``best`` with gains in the Linears of ``roles``, and all gains."""
    _GainPart.roles, _GainPart.gains = roles, []
    with patch("calibration.fitting._Part", _GainPart):
        made = quantize_model(workspace, cards.DEMO, BEST, force=True).artifact.path
    return logits(made, images), np.concatenate([*_GainPart.gains, np.ones(1)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", type=Path)
    chosen = parser.parse_args()
    images = held_out_digits()
    heads = "".join(f"{name:>13}" for name in SETS)
    print(f"{'':10}{heads}{'median |g - 1|':>16}{'largest':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, graph in demo_graphs(chosen.variants, Path(temporary)):
            workspace = Workspace(graph.parents[1])
            calibrate_model(workspace, cards.DEMO, CALIBRATION)
            reference = logits(graph, images)
            cells = ""
            for roles in SETS.values():
                found, gains = measured(workspace, roles, images)
                cells += f"{decibels(reference, found):13.1f}"
            off = np.abs(gains - 1)
            print(f"{name:10}{cells}{np.median(off):16.5f}{off.max():10.5f}", flush=True)


if __name__ == "__main__":
    main()
