"""Runners and engines with harmless differences from the reference are equivalent."""

from __future__ import annotations

from functools import partial

import onnx
import pytest
from cut_graphs import Body, CutRunner
from demo_workspaces import MADE
from harmless_runners import HARMLESS_RUNNERS
from judging import decibels, judge_runners

from clipdeploy.imaging import open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners import Runner
from clipdeploy.verification.result import Row
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verifier import VerifyConfig
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

CLASSES = tuple("0123456789")
COUNT = 144
# The runner adds less noise than its precision has: FP32 in TF32 is the worst.
LEAST_DB = {"fp32": 65.0, "fp16": 55.0, "int8": 38.0}


class Bench:
    """The sound graphs in two parts: the first is computed once for an image."""

    def __init__(self, workspace: Workspace) -> None:
        self._graphs = {each: workspace.graph(cards.DEMO, each) for each in MADE}
        self._bodies = {each: Body(path) for each, path in self._graphs.items()}
        self.targets = {
            each: Target(path, "graph", read_passport(path)) for each, path in self._graphs.items()
        }

    def sound(self, precision: str) -> CutRunner:
        spec = self.targets[precision].passport.input
        return CutRunner(self._bodies[precision], onnx.load(self._graphs[precision]), spec)

    def changed(self, name: str) -> Runner:
        precision, change = HARMLESS_RUNNERS[name]
        return change(self.sound(precision))


@pytest.fixture(scope="module")
def bench(demo_workspace: Workspace) -> Bench:
    return Bench(demo_workspace)


@pytest.fixture(scope="module")
def judged(bench: Bench, demo_model: LoadedModel) -> dict[str, Row]:
    """Every runner of this file in one run over the same 144 images."""
    images = select(open_images(cards.demo_file("test.zip"), CLASSES), COUNT, seed=0)
    runners = {
        name: (precision, partial(bench.changed, name))
        for name, (precision, _) in HARMLESS_RUNNERS.items()
    }
    return judge_runners(demo_model, bench.targets, runners, images)


@pytest.mark.parametrize("name", HARMLESS_RUNNERS)
def test_a_harmless_runner(name: str, judged: dict[str, Row]) -> None:
    row = judged[name]
    assert row.verdict == "equivalent", row.reason
    assert decibels(row) > LEAST_DB[HARMLESS_RUNNERS[name][0]]


def test_all_500_digits_prove_a_point_and_a_quarter(bench: Bench, demo_model: LoadedModel) -> None:
    images = open_images(cards.demo_file("test.zip"), CLASSES)
    runners = {each: (each, partial(bench.sound, each)) for each in MADE}
    config = VerifyConfig(max_drop=1.25, batch=50, workers=0)
    rows = judge_runners(demo_model, bench.targets, runners, images, config)
    assert {row.verdict for row in rows.values()} == {"equivalent"}
