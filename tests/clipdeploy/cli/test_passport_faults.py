"""Edited passports are refused, for every field, artifact and command.

The demo's artifacts are real, TensorRT-RTX compiles the engine; only their passports are edited.

Covers: clipdeploy/stages/bisect.py, clipdeploy/workspace/graph_facts.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from click.testing import Result
from passport_edits import (
    DIGITS,
    EVERY,
    FAULTS,
    Edit,
    edits,
    file,
    put,
    restamp,
    text_of,
    write_text,
)
from verify_command import FEW, TEST, refused, run, verify

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import sha256_file
from clipdeploy.engines.passport import passport_path
from clipdeploy.models import cards
from clipdeploy.pipeline import benchmark_model
from clipdeploy.stages.bisect import BisectConfig, bisect_model
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.passports import checked_passport


def bisect(engine_artifacts: Path, path: Path) -> Result:
    at = ("--model", "demo", "--workspace", engine_artifacts, "--images", "8")
    return run("bisect", path, "--data", TEST, *at)


def every_command(engine_artifacts: Path, path: Path, image: Path) -> Iterator[tuple[str, Result]]:
    """Every command that reads this artifact, in the workspace and as a single file."""
    at = ("--workspace", engine_artifacts)
    graphs_only = () if path.suffix == ".engine" else ("--graphs-only",)
    yield "verify", verify(engine_artifacts, *FEW, *graphs_only)
    yield "verify FILE", verify(engine_artifacts, path, *FEW)
    yield "predict", run("predict", image, "--model", "demo", "--artifact", path, *at)
    yield "predict FILE", run("predict", image, "--artifact", path, *at)
    for flag in ("--triton", "--cpp"):
        yield f"package {flag}", run("package", path, flag, engine_artifacts.parent / "out", *at)
    if path.suffix == ".onnx":
        yield "bisect", bisect(engine_artifacts, path)


def check_refused(result: Result, *words: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (error,) = (line for line in result.stderr.splitlines() if line.startswith("error: "))
    for word in words:
        assert any(each in error for each in word.split("|")), error


# --- each field


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_edited_passport_is_not_judged(fault: str, kind: str, engine_artifacts: Path) -> None:
    edit, field = FAULTS[fault]
    path = file(engine_artifacts, kind)
    restamp(path, edit)
    graphs_only = () if path.suffix == ".engine" else ("--graphs-only",)
    check_refused(verify(engine_artifacts, *FEW, *graphs_only), path.name, field, "--force")


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("class names rolled", "is 1, not 0"),
        ("another crop", "is 0.9, not 1.0"),
        ("ImageNet's mean", "is 0.485, not 0.48145466"),
    ],
)
def test_every_command_refuses_it(
    fault: str, said: str, kind: str, engine_artifacts: Path, three: Path
) -> None:
    edit, field = FAULTS[fault]
    path = file(engine_artifacts, kind)
    restamp(path, edit)
    for command, result in every_command(engine_artifacts, path, three):
        check_refused(result, path.name, field, said, "--force")
        assert not (engine_artifacts.parent / "out").exists(), command


# --- engines


ENGINE_FAULTS: dict[str, tuple[Edit, str]] = {
    "profiles": (put("profiles", [[1, 8, 64]]), "profiles[0][2]"),
    "no profile": (put("profiles", []), "batch profiles"),
    "profiles out of order": (put("profiles", [[8, 1, 32]]), "batch profiles"),
    "profiles of no number": (put("settings.profiles", "many"), "profiles"),
    "capabilities": (
        edits(put("capabilities", ["9.0"]), put("settings.compute_capability", ["8.9"])),
        "capabilities[0]",
    ),
    "hardware": (put("hardware", "ampere-plus"), "hardware"),
    "size": (put("plan_bytes", 1), "plan_bytes"),
    "plan": (put("hashes.plan", "0" * 64), "the file that its passport describes"),
    "graph": (put("hashes.graph", "0" * 64), "was not made from"),
    "source": (put("hashes.source_graph", "0" * 64), "hashes.source_graph"),
    "calibration": (put("hashes.calibration", "0" * 64), "hashes.calibration"),
    "checkpoint": (put("hashes.checkpoint", "0" * 64), "hashes.checkpoint"),
}


@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_what_an_engines_passport_says_beside_its_graphs(
    fault: str, engine_artifacts: Path, three: Path
) -> None:
    edit, field = ENGINE_FAULTS[fault]
    path = file(engine_artifacts, "int8.engine")
    raw = json.loads(text_of(path))
    edit(raw)
    write_text(path, json.dumps(raw))
    for _, result in every_command(engine_artifacts, path, three):
        check_refused(result, path.name, field)


def test_an_engine_without_its_graph_is_compared_with_the_rest(
    engine_artifacts: Path, tmp_path: Path
) -> None:
    """With the FP32 graph in the same folder, with the reference, and with the card alone."""
    path = file(engine_artifacts, "int8.engine")
    alone = tmp_path / "alone" / "digits.engine"
    alone.parent.mkdir()
    shutil.copy(path, alone)
    shutil.copy(passport_path(path), passport_path(alone))
    assert checked_passport(alone).engine is not None
    file(engine_artifacts, "int8.onnx").unlink()
    assert checked_passport(path).engine is not None
    for where in (path, alone):
        restamp(where, put("class_names", [*DIGITS[1:], "0"]))
        with pytest.raises(ArtifactError, match=r"class_names\[0\]"):
            checked_passport(where)
    check_refused(verify(engine_artifacts, alone, *FEW), "digits.engine", "class_names[0]")


def test_all_artifacts_edited_alike_are_held_against_the_card(
    engine_artifacts: Path, three: Path
) -> None:
    """With every hash corrected as well: no two of them contradict each other."""
    rolled = put("class_names", [*DIGITS[1:], "0"])
    restamp(file(engine_artifacts, "fp32.onnx"), rolled)
    source = sha256_file(file(engine_artifacts, "fp32.onnx"))
    of_it = edits(rolled, put("parents.source_graph", source))
    for kind in EVERY[1:]:
        restamp(file(engine_artifacts, kind), of_it)
    engine = file(engine_artifacts, "int8.engine")
    raw = json.loads(text_of(engine))
    raw["hashes"]["source_graph"] = source
    raw["hashes"]["graph"] = sha256_file(file(engine_artifacts, "int8.onnx"))
    write_text(engine, json.dumps(raw))
    for kind in EVERY:
        for _, result in every_command(engine_artifacts, file(engine_artifacts, kind), three):
            check_refused(result, "class_names[0]", "--force")


# --- passports that cannot be read


UNREADABLE = {
    "no JSON": "{",
    "empty": "",
    "a list": "[]",
    "of a newer clipdeploy": '{"schema": 99}',
    "without weights": "weights",
    "of no known precision": "precision",
}


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("damage", UNREADABLE)
def test_every_command_refuses_what_it_cannot_read(
    damage: str, kind: str, engine_artifacts: Path, three: Path
) -> None:
    path, text = file(engine_artifacts, kind), UNREADABLE[damage]
    if text in ("weights", "precision"):
        edit: Edit = (lambda raw: raw.pop(text)) if text == "weights" else put(text, "int4")
        restamp(path, edit)
    else:
        write_text(path, text)
    said = "newer clipdeploy" if "newer" in damage else "cannot be read"
    for _, result in every_command(engine_artifacts, path, three):
        check_refused(result, path.name, said)


def test_without_a_passport_a_graph_is_still_taken_for_itself(engine_artifacts: Path) -> None:
    path = engine_artifacts.parent / "bare.onnx"
    model = onnx.load(file(engine_artifacts, "int8.onnx"))
    del model.metadata_props[:]
    onnx.save(model, path)
    assert bisect(engine_artifacts, path).exit_code == 0
    assert verify(engine_artifacts, path, *FEW).exit_code == 0
    check_refused(
        run("package", path, "--triton", engine_artifacts.parent / "m"), "has no passport"
    )


# --- the commands that neither judge nor label


def test_a_benchmark_lists_it(engine_artifacts: Path) -> None:
    from clipdeploy.benchmark import BenchmarkConfig, benchmark_artifacts

    quick = BenchmarkConfig(batches=(1,), seconds=None, rounds=1, warmup=0.0)
    for kind in ("fp16.onnx", "int8.engine"):
        restamp(file(engine_artifacts, kind), put("preprocess.crop_pct", 0.9))
    named = benchmark_artifacts([file(engine_artifacts, kind) for kind in EVERY], quick)
    for result in (benchmark_model(Workspace(engine_artifacts), cards.DEMO, quick), named):
        assert {row.label for row in result.rows} == {"fp32.onnx", "int8.onnx"}
        reasons = {left.label: left.reason for left in result.not_run}
        for label in ("fp16.onnx", "int8.engine"):
            assert "preprocess.crop_pct is" in reasons[label]
    restamp(file(engine_artifacts, "fp32.onnx"), put("preprocess.crop_pct", 0.9))
    with pytest.raises(ArtifactError, match=r"does not match .*: preprocess\.crop_pct is"):
        benchmark_model(Workspace(engine_artifacts), cards.DEMO, quick)


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--data", cards.demo_file("calibration.zip")),
        ("quantize",),
        ("build-engine", "--fp32"),
        ("search", "--data", TEST),
        ("verify", "--data", TEST),
        ("bisect", "--data", TEST),
    ],
    ids=lambda words: words[0],
)
def test_nothing_is_made_from_an_edited_source(
    words: tuple[str | Path, ...], engine_artifacts: Path
) -> None:
    restamp(file(engine_artifacts, "fp32.onnx"), put("class_names", [*DIGITS[1:], "0"]))
    result = run(*words, "--model", "demo", "--workspace", engine_artifacts)
    refused(result, 1, "fp32.onnx", "class_names[0]", "export --model clip-vit-demo --force")


def test_the_mend_mends(engine_artifacts: Path) -> None:
    restamp(file(engine_artifacts, "fp32.onnx"), put("class_names", [*DIGITS[1:], "0"]))
    at = ("--model", "demo", "--workspace", engine_artifacts)
    assert run("export", *at, "--force").exit_code == 0
    assert verify(engine_artifacts, *FEW, "--graphs-only").exit_code == 0
    restamp(file(engine_artifacts, "int8.onnx"), put("preprocess.size", 36))
    assert run("quantize", *at, "--force").exit_code == 0
    assert verify(engine_artifacts, *FEW, "--graphs-only").exit_code == 0
    bisect_model(Workspace(engine_artifacts), cards.DEMO, TEST, None, BisectConfig(4, batch=4))
