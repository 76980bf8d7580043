"""The verifier on the demo's graphs, correct and broken ones.

Covers: clipdeploy/verification/result.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from judging import each_once
from onnx import numpy_helper
from rich.console import Console

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.imaging import ImageFolder, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.verification.result import Verification, verdict_line, verification_table
from clipdeploy.verification.results import Results, merge_results
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def digits() -> ImageFolder:
    return open_images(cards.demo_file("test.zip"), CLASSES)


def target(path: Path) -> Target:
    return Target(path, "graph", read_passport(path))


def verify(
    model: LoadedModel,
    targets: Sequence[Target],
    images: ImageFolder,
    config: VerifyConfig = VerifyConfig(),
) -> Verification:
    # test_faults.py makes the repeated calls.
    with each_once():
        results = run_verification(model, targets[0].passport, targets, images, config)
    return judge_results(results, config.max_drop)


def shown(result: Verification) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(verification_table(result))
    return capture.get()


def _shift_scales(proto: onnx.ModelProto) -> None:
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.name.endswith("mlp.fc2.input_scale/fp16"):
            value = numpy_helper.to_array(tensor) * np.float16(0.02)
            proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(value, tensor.name))


def _turn_classes(proto: onnx.ModelProto) -> None:
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.name.startswith("head.bias"):
            value = np.roll(np.linspace(0, 40, 10), 3).astype(numpy_helper.to_array(tensor).dtype)
            proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(value, tensor.name))


def _overflow(proto: onnx.ModelProto) -> None:
    for index, tensor in enumerate(proto.graph.initializer):
        if tensor.name.startswith("head.bias"):
            value = np.full(10, np.nan).astype(numpy_helper.to_array(tensor).dtype)
            proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(value, tensor.name))


@pytest.mark.parametrize("ruin", [_shift_scales, _turn_classes, _overflow])
def test_a_ruined_graph_fails(
    ruin: Callable[[onnx.ModelProto], None],
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    tmp_path: Path,
) -> None:
    proto = onnx.load(demo_workspace.graph(cards.DEMO, "int8"))
    before = proto.SerializeToString()
    ruin(proto)
    assert proto.SerializeToString() != before
    path = tmp_path / "ruined.onnx"
    onnx.save(proto, path)
    good = target(demo_workspace.graph(cards.DEMO, "fp32"))
    # Twenty images without a difference prove a drop below 16.1 points: z^2 / (n + z^2).
    result = verify(demo_model, [good, target(path)], few(digits), VerifyConfig(max_drop=17.0))
    assert not result
    assert [row.verdict for row in result.rows] == ["equivalent", "regressed"]
    assert verdict_line(result) == "REGRESSED: int8 graph"


def test_random_weights_are_never_judged(
    demo_workspace: Workspace, demo_model: LoadedModel, digits: ImageFolder
) -> None:
    stamped = replace(demo_model, weights=replace(demo_model.weights, kind="random"))
    result = verify(stamped, [target(demo_workspace.graph(cards.DEMO, "fp32"))], few(digits))
    assert not result
    assert result.rows[0].verdict == "not judged"
    assert "NOT JUDGED" in shown(result)
    assert "EQUIVALENT" not in shown(result)


def test_images_without_labels_are_never_judged(
    demo_workspace: Workspace, demo_model: LoadedModel, digits: ImageFolder
) -> None:
    bare = ImageFolder(digits.root, tuple(replace(e, label=None) for e in few(digits).entries))
    result = verify(demo_model, [target(demo_workspace.graph(cards.DEMO, "fp32"))], bare)
    assert not result
    assert result.rows[0].verdict == "not judged"


def test_brackets_in_a_name_are_no_markup(
    demo_workspace: Workspace, demo_model: LoadedModel, digits: ImageFolder
) -> None:
    result = verify(demo_model, [target(demo_workspace.graph(cards.DEMO, "fp32"))], few(digits))
    (row,) = result.rows
    foreign = replace(row, artifact="graphs/model[v2].onnx", vouched=False)
    assert "model[v2].onnx" in shown(replace(result, rows=(foreign,))).split()


def few(images: ImageFolder) -> ImageFolder:
    return select(images, 20, seed=0)


def test_max_drop_is_the_threshold(
    demo_workspace: Workspace, demo_model: LoadedModel, digits: ImageFolder
) -> None:
    graph = target(demo_workspace.graph(cards.DEMO, "fp32"))
    # Twenty images without a difference prove a drop below 16.1 points: z^2 / (n + z^2).
    assert verify(demo_model, [graph], few(digits), VerifyConfig(max_drop=17.0))
    result = verify(demo_model, [graph], few(digits), VerifyConfig(max_drop=15.0))
    assert not result
    assert verdict_line(result).startswith("UNDECIDED: about ")
    with pytest.raises(UsageError, match=r"invalid value -1\.0 for"):
        VerifyConfig(max_drop=-1.0)


def test_shards_of_other_threads_are_not_joined(
    demo_workspace: Workspace, demo_model: LoadedModel, digits: ImageFolder
) -> None:
    graph = target(demo_workspace.graph(cards.DEMO, "int8"))

    def shard(number: int, threads: int) -> Results:
        config = VerifyConfig(shard=(number, 2), threads=threads)
        return run_verification(demo_model, graph.passport, [graph], few(digits), config)

    before = torch.get_num_threads()
    try:
        first = shard(1, 1)
        assert torch.get_num_threads() == 1
        assert len(merge_results([first, shard(2, 1)]).records) == 20
        with pytest.raises(ArtifactError, match=r"they differ in threads \(.*--threads"):
            merge_results([first, shard(2, 2)])
    finally:
        torch.set_num_threads(before)
