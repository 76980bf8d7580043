"""One fault at a time: none is equivalent with the metrics of a correct graph.

All graphs and runners are judged in one run over the same 72 digits.  With no difference between
artifact and reference their interval ends at 5.1 points, so that 6 are allowed.  So few images
cannot confirm the baseline: test_data_faults.py does so with more.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from broken_runners import RUN_FAULTS, BrokenRunner
from demo_workspaces import MADE
from graph_faults import FP16_FAULTS, FP32_FAULTS, INT8_FAULTS, RATIO_FAULTS, REGRESSED
from harmless_changes import FP32_CHANGES, INT8_CHANGES
from harmless_rewrites import MORE_FP16_CHANGES, MORE_FP32_CHANGES, MORE_INT8_CHANGES
from judging import EachOnce
from precision_faults import MORE_FP16_FAULTS, MORE_INT8_FAULTS

from clipdeploy.core.errors import ArtifactError, GraphError
from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, PASSPORT_KEY, Preprocess
from clipdeploy.imaging import ImageFolder, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners import Runner
from clipdeploy.stages.quantize import quantize_model
from clipdeploy.verification import verifier
from clipdeploy.verification.metrics import Fidelity
from clipdeploy.verification.result import Row, Verification
from clipdeploy.verification.results import ArtifactEntry
from clipdeploy.verification.targets import Target, named_targets, open_target
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport
from exporters.precision import Fp16Config, half_precision, io_passport
from exporters.preprocess_graph import add_preprocessing, preprocessed_passport

CLASSES = tuple("0123456789")
ALLOWED = 6.0
# Two full batches, which faults of the run tell apart by their number, and a smaller one.
COUNT, BATCH = 72, 28
CONFIG = VerifyConfig(max_drop=ALLOWED, batch=BATCH, workers=0, threads=1)
GRAPH_FAULTS = {
    name: (precision, edit, shown)
    for precision, faults in (
        ("fp32", FP32_FAULTS),
        ("fp16", FP16_FAULTS | MORE_FP16_FAULTS),
        ("int8", INT8_FAULTS | MORE_INT8_FAULTS),
        ("int8 in ratio form", RATIO_FAULTS),
    )
    for name, (edit, shown) in faults.items()
}
CHANGES = {
    name: (precision, edit)
    for precision, changes in (
        ("fp32", FP32_CHANGES | MORE_FP32_CHANGES),
        ("fp16", MORE_FP16_CHANGES),
        ("int8", INT8_CHANGES | MORE_INT8_CHANGES),
    )
    for name, edit in changes.items()
}
# Wrong constants in graphs that take the image's bytes: the fault, and the most dB.
INNER_PREPROCESSING: dict[str, tuple[Callable[[Preprocess], Preprocess], float]] = {
    "ImageNet's mean and std in the graph": (
        lambda spec: replace(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD),
        25,
    ),
    "no mean and std in the graph": (
        lambda spec: replace(spec, mean=(0.0,) * 3, std=(1.0,) * 3),
        REGRESSED,
    ),
    "pixels not divided by 255 in the graph": (
        lambda spec: replace(spec, std=tuple(each / 255 for each in spec.std)),
        REGRESSED,
    ),
}
# The SQNR of a correct graph of each precision here; rounding limits float16 and below.
SOUND_DB = {"fp32": 120.0, "fp16": 60.0, "int8": 39.0, "int8 in ratio form": 39.0}
HARMLESS_DB = {"fp32": 115.0, "fp16": 55.0, "int8": 39.0}


@pytest.fixture(scope="module")
def digits() -> ImageFolder:
    """In the order of the file, sorted by class: the verifier shuffles them itself."""
    return select(open_images(cards.demo_file("test.zip"), CLASSES), COUNT, seed=0)


def target(path: Path) -> Target:
    return Target(path, "graph", read_passport(path))


def edited(source: Path, path: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
    proto = onnx.load(source)
    before = proto.SerializeToString(deterministic=True)
    edit(proto)
    assert proto.SerializeToString(deterministic=True) != before
    onnx.save(proto, path)
    return path


def without_passport(proto: onnx.ModelProto) -> None:
    kept = [entry for entry in proto.metadata_props if entry.key != PASSPORT_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)


def taking_bytes(source: Path, path: Path, spec: Preprocess) -> Path:
    model = load_graph(source)
    add_preprocessing(model, spec)
    return save_graph(model, path, preprocessed_passport(read_passport(source))).path


def halves_at_both_ends(source: Path, path: Path) -> Path:
    model, config = load_graph(source), Fp16Config(half_io=True)
    half_precision(model, config)
    passport = replace(io_passport(read_passport(source), config), precision="fp16")
    return save_graph(model, path, passport).path


def both_forms(workspace: Workspace, folder: Path) -> tuple[Workspace, Path]:
    """A workspace whose INT8 graph is in the channel form, and the graph in the ratio form."""
    channel, ratio = Workspace(folder / "channel"), Workspace(folder / "ratio")
    for made, backend in ((channel, "tensorrt"), (ratio, "tensorrt-rtx")):
        shutil.copytree(workspace.folder(cards.DEMO), made.folder(cards.DEMO))
        quantize_model(made, cards.DEMO, backend=backend)  # type: ignore[arg-type]
    return channel, ratio.graph(cards.DEMO, "int8")


def faulty(workspace: Workspace, ratio: Path, folder: Path) -> Iterator[tuple[str, Target]]:
    graphs = {precision: workspace.graph(cards.DEMO, precision) for precision in MADE}
    graphs["int8 in ratio form"] = ratio
    for precision, graph in graphs.items():
        yield f"sound {precision}", target(graph)
    for number, (name, (precision, edit, _)) in enumerate(GRAPH_FAULTS.items()):
        path = edited(graphs[precision], folder / f"fault-{number}.onnx", edit)
        yield name, target(path)
    spec = read_passport(graphs["fp32"]).preprocess
    for number, (name, (change, _)) in enumerate(INNER_PREPROCESSING.items()):
        path = taking_bytes(graphs["fp32"], folder / f"bytes-{number}.onnx", change(spec))
        yield name, target(path)
    for number, name in enumerate(RUN_FAULTS):
        yield name, replace(target(graphs["fp32"]), path=folder / f"run-{number}.onnx")


def harmless(workspace: Workspace, folder: Path) -> Iterator[tuple[str, Target]]:
    source = workspace.graph(cards.DEMO, "fp32")
    passport = read_passport(source)
    for number, (name, (precision, edit)) in enumerate(CHANGES.items()):

        def both(proto: onnx.ModelProto, edit: Callable[[onnx.ModelProto], None] = edit) -> None:
            edit(proto)
            without_passport(proto)

        graph = workspace.graph(cards.DEMO, precision)  # type: ignore[arg-type]
        path = edited(graph, folder / f"change-{number}.onnx", both)
        (found,) = named_targets([path], passport, trust=False)
        assert not found.vouched
        yield name, found
    spec = passport.preprocess
    yield "preprocessing in the graph", target(taking_bytes(source, folder / "u8.onnx", spec))
    yield "fp16 at both ends", target(halves_at_both_ends(source, folder / "io.onnx"))


# The only fault in this file that mixes images.
MIXES = "the class token of another image"
# Harmless changes of kernels or nodes that depend on the batch: these run in every call.
BY_BATCH = {
    "sound fp32",
    "sound fp16",
    "sound int8",
    "sound int8 in ratio form",
    "a fixed batch",
    "LayerNorm written out",
    "softmax written out",
    "a Linear as a convolution",
    "an If by the batch size with equal branches",
    "the batch turned twice",
    "rows added and cut off",
    "fp16: an If by the batch size with equal branches",
    "a weight's scale in two factors",
    "preprocessing in the graph",
    "fp16 at both ends",
}


@pytest.fixture(scope="module")
def judged(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Row]:
    """Every graph and runner of this file, judged in one run."""
    folder = tmp_path_factory.mktemp("faults")
    channel, ratio = both_forms(demo_workspace, folder)
    named = [*faulty(channel, ratio, folder), *harmless(channel, folder)]
    assert len({name for name, _ in named}) == len(named)
    sound, entry = open_target(named[0][1])
    assert sound is not None
    once = EachOnce(sound)
    spoilers = {t.path: RUN_FAULTS[name][0] for name, t in named if name in RUN_FAULTS}
    every_call = {t.path for name, t in named if name in BY_BATCH | {MIXES}}

    def opened(each: Target, **options: Any) -> tuple[Runner | None, ArtifactEntry]:
        if each.path not in spoilers:
            runner, known = open_target(each, **options)
            return EachOnce(runner) if runner and each.path not in every_call else runner, known
        return BrokenRunner(once, spoilers[each.path], BATCH), replace(
            entry, artifact=str(each.path)
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "open_target", opened)
        targets = [each for _, each in named]
        results = run_verification(demo_model, targets[0].passport, targets, digits, CONFIG)
    result = judge_results(results, ALLOWED)
    # The reference errs on none of these images.
    assert (result.baseline.status, result.baseline.top1) == ("unconfirmed", 100)
    return dict(zip((name for name, _ in named), result.rows, strict=True))


def fidelity(row: Row) -> Fidelity:
    assert row.fidelity is not None
    return row.fidelity


def decibels(row: Row) -> float:
    found = fidelity(row).sqnr_db
    assert found is not None
    return found


def never_unnoticed(row: Row, sound: Row) -> None:
    """Another verdict than the sound graph's, or twice its noise at least."""
    assert row.verdict != "equivalent" or decibels(row) < decibels(sound) - 3


@pytest.mark.parametrize("precision", SOUND_DB)
def test_a_sound_graph_is_equivalent(precision: str, judged: dict[str, Row]) -> None:
    row = judged[f"sound {precision}"]
    assert row.verdict == "equivalent"
    assert decibels(row) > SOUND_DB[precision]
    assert fidelity(row).agreement == 100


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_a_fault_in_the_graph(name: str, judged: dict[str, Row]) -> None:
    precision, _, shown = GRAPH_FAULTS[name]
    row = judged[name]
    never_unnoticed(row, judged[f"sound {precision}"])
    if name == MIXES:
        assert row.verdict == "not judged"
        assert row.reason.startswith("not repeatable")
    elif shown == REGRESSED:
        assert row.verdict == "regressed", row.reason
    else:
        assert decibels(row) < shown


@pytest.mark.parametrize("name", INNER_PREPROCESSING)
def test_a_fault_in_the_graphs_preprocessing(name: str, judged: dict[str, Row]) -> None:
    _, shown = INNER_PREPROCESSING[name]
    row = judged[name]
    never_unnoticed(row, judged["sound fp32"])
    if shown == REGRESSED:
        assert row.verdict == "regressed", row.reason
    else:
        assert decibels(row) < shown


@pytest.mark.parametrize("name", RUN_FAULTS)
def test_a_fault_in_the_run(name: str, judged: dict[str, Row]) -> None:
    _, shown = RUN_FAULTS[name]
    row, sound = judged[name], judged["sound fp32"]
    if shown == "NaN":
        assert (row.verdict, row.reason) == ("regressed", "logits are NaN or infinite")
        assert not fidelity(row).finite
        return
    never_unnoticed(row, sound)
    if isinstance(shown, float):
        assert fidelity(row).max_abs > shown > 1000 * fidelity(sound).max_abs
    elif shown == "not repeatable":
        assert row.verdict == "not judged", row.reason
        assert row.reason.startswith(shown)
    else:
        assert row.verdict == shown, row.reason


def test_one_wrong_image_is_the_worst_and_is_named(judged: dict[str, Row]) -> None:
    row = judged["one image's result stale"]
    assert row.disagreements == 1
    assert row.worst[0].max_abs == fidelity(row).max_abs
    # It was one call: the repeated image has another answer.
    assert row.verdict == "not judged"
    assert row.reason.startswith("not repeatable")


@pytest.mark.parametrize("name", [*CHANGES, "preprocessing in the graph", "fp16 at both ends"])
def test_a_harmless_change(name: str, judged: dict[str, Row]) -> None:
    precision = CHANGES[name][0] if name in CHANGES else "fp32"
    precision = "fp16" if name.startswith("fp16") else precision
    row = judged[name]
    assert row.verdict == "equivalent", row.reason
    # Sums in another order: some float32 rounding more; float16 at both ends: the pixels' as well.
    assert decibels(row) > HARMLESS_DB[precision]
    assert fidelity(row).agreement == 100
    assert ("this file has no passport" in row.reason) == (name in CHANGES)


def run_broken(
    spoil: Callable[..., object],
    workspace: Workspace,
    model: LoadedModel,
    images: ImageFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> Verification:
    graph = target(workspace.graph(cards.DEMO, "fp32"))
    runner, entry = open_target(graph)
    assert runner is not None
    broken = BrokenRunner(runner, spoil)  # type: ignore[arg-type]
    monkeypatch.setattr(verifier, "open_target", lambda each, **options: (broken, entry))
    few = select(images, 20, seed=0)
    results = run_verification(model, graph.passport, [graph], few, CONFIG)
    return judge_results(results, ALLOWED)


@pytest.mark.parametrize(
    ("spoil", "shape"),
    [
        (lambda logits, *_: logits[:, :-1], r"\(20, 9\)"),
        (lambda logits, *_: logits.repeat(2, axis=1), r"\(20, 20\)"),
        (lambda logits, *_: logits[:-1], r"\(19, 10\)"),
        (lambda logits, *_: logits[:, :, None], r"\(20, 10, 1\)"),
    ],
)
def test_logits_of_another_shape_end_the_run(
    spoil: Callable[..., object],
    shape: str,
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ArtifactError, match=rf"gave logits of shape {shape}, not \(20, 10\)"):
        run_broken(spoil, demo_workspace, demo_model, digits, monkeypatch)


def test_a_runner_that_fails_ends_the_run(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> object:
        raise GraphError("out of memory")

    with pytest.raises(GraphError, match="out of memory"):
        run_broken(fail, demo_workspace, demo_model, digits, monkeypatch)


def test_too_few_images_are_undecided(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = run_broken(lambda logits, *_: logits, demo_workspace, demo_model, digits, monkeypatch)
    assert [row.verdict for row in result.rows] == ["undecided"]
    assert not result
