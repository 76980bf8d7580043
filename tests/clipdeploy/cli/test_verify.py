"""Verification as a user runs it: in shards, killed, from the cache, on named artifacts.

Covers: clipdeploy/stages/verify/merge.py, clipdeploy/stages/verify/run.py,
    clipdeploy/stages/verify/setup.py, clipdeploy/verification/disagreements.py,
    clipdeploy/verification/early_stop.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest
from forked_runs import killed_runs
from graph_faults import FP32_FAULTS
from verify_command import FEW, TEST, good, merge, refused, run, verify

from clipdeploy.models import cards
from clipdeploy.runners import OnnxRunner
from clipdeploy.stages.verify import run as stage
from clipdeploy.verification import verifier
from exporters.graphs import load_graph, save_graph
from exporters.headers import read_passport


def graph(artifacts: Path) -> Path:
    return artifacts / cards.DEMO / "fp32.onnx"


def kept(artifacts: Path) -> list[str]:
    return sorted(path.name for path in (artifacts / cards.DEMO).glob("verification*"))


# --- one answer, however it was come by


def test_shards_merged_equal_one_run(artifacts: Path) -> None:
    whole = verify(artifacts, *FEW, "--json")
    assert good(whole)["images"] == 12
    records = (artifacts / cards.DEMO / "verification.jsonl").read_bytes()
    disagreements = (artifacts / cards.DEMO / "disagreements.csv").read_bytes()
    for part in ("1/3", "3/3"):
        shard_run = verify(artifacts, *FEW, "--shard", part)
        assert shard_run.exit_code == 0
        assert f"verification.{part.replace('/', '-of-')}.jsonl" in shard_run.stdout
    refused(merge(artifacts), 1, "1 of 4 batches are missing", "run the missing shards")
    assert verify(artifacts, *FEW, "--shard", "2/3").exit_code == 0
    merged = merge(artifacts, "--max-drop", "30", "--json")
    assert merged.stdout == whole.stdout
    assert merged.exit_code == 0
    lines = (artifacts / cards.DEMO / "verification.jsonl").read_bytes().split(b"\n")
    # All but the line that says which files of this machine they are.
    assert lines[1:] == records.split(b"\n")[1:]
    assert (artifacts / cards.DEMO / "disagreements.csv").read_bytes() == disagreements


def test_shards_from_elsewhere_are_named(artifacts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(artifacts, other)
    for place, part in ((artifacts, "1/2"), (other, "2/2")):
        assert verify(place, *FEW, "--shard", part).exit_code == 0
    parts = [
        artifacts / cards.DEMO / "verification.1-of-2.jsonl",
        other / cards.DEMO / "verification.2-of-2.jsonl",
    ]
    # The artifact's path is another one, and so its file, for all that anybody can tell.
    result = merge(artifacts, *parts, "--max-drop", "30")
    refused(result, 1, "not of one run", "artifacts")


def test_shards_of_different_runs_are_refused(artifacts: Path) -> None:
    assert verify(artifacts, *FEW, "--shard", "1/2").exit_code == 0
    batch = [word if word != "3" else "4" for word in FEW]
    assert verify(artifacts, *batch, "--shard", "2/2").exit_code == 0
    refused(merge(artifacts), 1, "not of one run", "batch")


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "1", "1/0", "-1/3"])
def test_a_shard_that_does_not_exist(shard: str, artifacts: Path) -> None:
    refused(verify(artifacts, *FEW, "--shard", shard), 2, "shard")
    assert kept(artifacts) == []


def test_a_shard_cannot_stop_early(artifacts: Path) -> None:
    refused(verify(artifacts, *FEW, "--shard", "1/2", "--sequential"), 2, "cannot stop early")


# Slow enough for a kill to fall between two batches.
SLOW = """
import sys, time
from pathlib import Path
from clipdeploy.models import cards
from clipdeploy.stages.verify.run import VerifyScope, verify_model
from clipdeploy.verification import verifier
from clipdeploy.workspace.folder import Workspace

measure = verifier.measure_images

def slowly(*words):
    time.sleep(0.15)
    return measure(*words)

verifier.measure_images = slowly

def run():
    # As FEW says, or the run that resumes would be another one.
    config = verifier.VerifyConfig(max_drop=30, batch=3, workers=0)
    workspace, scope = Workspace(Path(sys.argv[1])), VerifyScope(limit=12)
    verify_model(workspace, cards.DEMO, Path(sys.argv[2]), config, scope)
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_at_several_moments_and_resumed(
    artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = verifier.measure_images, list[object]()

    def counted(*words: Any) -> Any:
        measured.append(words)
        return measure(*words)

    monkeypatch.setattr(verifier, "measure_images", counted)
    whole = verify(artifacts, *FEW, "--json")
    of_all = len(measured)
    folder = artifacts / cards.DEMO
    records = (folder / "verification.jsonl").read_bytes()
    (folder / "verification.jsonl").unlink()
    partial, seen = folder / "verification.jsonl.partial", []
    words = (str(artifacts), str(TEST))
    for code in killed_runs(SLOW, *words, partial=partial, times=4, seed=1, delay=0.15):
        assert code in (0, -signal.SIGKILL)
        if not partial.exists():
            break
        seen.append(partial.read_bytes().count(b"\n"))
    assert seen, "no kill came in the middle"
    assert seen == sorted(seen), "a resumed run lost what was done"
    # And a last line that was cut as the power went.
    if partial.exists():
        partial.write_bytes(partial.read_bytes()[:-20])
    measured.clear()
    resumed = verify(artifacts, *FEW, "--json")
    assert len(measured) < of_all, "the resumed run began again"
    assert resumed.stdout == whole.stdout
    assert (folder / "verification.jsonl").read_bytes() == records
    assert not partial.exists()


def test_a_finished_run_is_only_read(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = verify(artifacts, *FEW, "--json")

    def never(self: OnnxRunner, images: object) -> None:
        raise AssertionError("an image was run again")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxRunner, "__call__", never)
        assert verify(artifacts, *FEW, "--json").stdout == first.stdout
        # Verdicts are made from the records: another limit needs no run.
        stricter = verify(artifacts, *FEW, "--max-drop", "1", "--json")
        assert stricter.exit_code == 3
        assert json.loads(stricter.stdout)["rows"][0]["verdict"] == "undecided"
        assert isinstance(verify(artifacts, *FEW, "--force").exception, AssertionError)
    # Another graph under the same name is another question.
    proto = onnx.load(graph(artifacts))
    edit, _ = FP32_FAULTS["the head's rows rolled"]
    edit(proto)
    onnx.save(proto, graph(artifacts))
    assert json.loads(verify(artifacts, *FEW, "--json").stdout)["rows"][0]["verdict"] == "regressed"


def test_from_the_cache_it_is_the_same(artifacts: Path, digits: Path) -> None:
    few = ("--images", "12", "--max-drop", "45", "--workers", "0", "--json", "--force")
    # The files' states are not trusted before they have settled.
    for path in digits.rglob("*.png"):
        os.utime(path, (1, 1))
    plain = verify(artifacts, *few, data=digits)
    first = verify(artifacts, *few, "--cache-crops", data=digits)
    cache = Path(os.environ["CLIPDEPLOY_HOME"]) / "crops"
    written = sorted(path.name for path in cache.rglob("*") if path.is_file())
    assert written
    second = verify(artifacts, *few, "--cache-crops", data=digits)
    assert good(plain)
    assert plain.stdout == first.stdout == second.stdout
    tiny = verify(artifacts, *few, "--cache-crops", "--cache-size", "0", data=digits)
    assert tiny.stdout == plain.stdout


# --- what is judged


def test_sequential_stops_early_and_says_so(artifacts: Path) -> None:
    at = ("--sequential", "--max-drop", "20", "--batch", "10")
    result = verify(artifacts, *at, "--json")
    found = good(result)
    assert found["sequential"]
    assert found["images"] < found["listed"] == 500
    assert "anytime interval" in found["rows"][0]["reason"]
    shown = verify(artifacts, *at)
    assert "(stopped early, of 500)" in " ".join(shown.stdout.split())
    # What it leaves is no full run.
    whole = good(verify(artifacts, "--max-drop", "20", "--images", "100", "--json"))
    assert whole["images"] == whole["listed"] == 100


def test_named_artifacts(artifacts: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph(artifacts))
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "theirs.onnx")
    edit, _ = FP32_FAULTS["the head's rows rolled"]
    edit(proto)
    onnx.save(proto, tmp_path / "ruined.onnx")
    names = [graph(artifacts), tmp_path / "theirs.onnx"]
    found = good(verify(artifacts, *names, *FEW, "--json"))
    assert [row["artifact"] for row in found["rows"]] == [str(name) for name in names]
    assert [row["vouched"] for row in found["rows"]] == [True, False]
    result = verify(artifacts, tmp_path / "ruined.onnx", *FEW)
    assert result.exit_code == 3
    assert "REGRESSED: ruined.onnx" in result.stdout
    assert "disagreements.csv" in result.stderr
    refused(verify(artifacts, names[0], names[0], *FEW), 2, "named twice")
    refused(verify(artifacts, tmp_path / "weights.pth", *FEW), 2, "neither .onnx nor .engine")
    refused(verify(artifacts, tmp_path / "gone.onnx", *FEW), 1, "cannot read", "gone.onnx")


def test_an_artifact_of_another_model(artifacts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    random_weights = ("--random-init", "1", "--workspace", other)
    assert run("export", "--model", "demo", *random_weights).exit_code == 0
    path = graph(other)
    refused(verify(artifacts, path, *FEW), 1, "does not match the reference: weights is")
    passport = read_passport(graph(artifacts))
    renamed = type(passport)(**{**vars(passport), "model": "clip-vit-base-p16"})
    save_graph(load_graph(graph(artifacts)), tmp_path / "p16.onnx", renamed)
    result = verify(artifacts, tmp_path / "p16.onnx", *FEW)
    refused(result, 1, "does not match the reference: model is", "clip-vit-base-p16")


def test_the_baseline_option(artifacts: Path) -> None:
    # 24 images are too few to exclude much.
    assert good(verify(artifacts, *FEW, "--json"))["baseline"]["status"] == "unconfirmed"
    assert good(verify(artifacts, *FEW, "--json", "--baseline", "98,100"))
    missed = verify(artifacts, *FEW, "--baseline", "50")
    assert missed.exit_code == 3
    assert "NOT JUDGED: PyTorch's top-1 is" in " ".join(missed.stdout.split())
    assert "50.00 % is expected" in " ".join(missed.stdout.split())
    skipped = good(verify(artifacts, *FEW, "--json", "--baseline", "none"))
    assert skipped["baseline"]["status"] == "skipped"
    refused(verify(artifacts, *FEW, "--baseline", "good"), 2, "'good' is not an accuracy")


def rotated(digits: Path) -> Path:
    """Every class folder called after the next digit."""
    for digit in range(10):
        (digits / str(digit)).rename(digits / f"was-{digit}")
    for digit in range(10):
        (digits / f"was-{digit}").rename(digits / str((digit + 1) % 10))
    return digits


def test_a_first_look_ends_a_long_run(
    artifacts: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_LONG", 80)
    monkeypatch.setattr(stage, "_PROBE", 40)
    monkeypatch.setattr("clipdeploy.verification.diagnosis._SAMPLE", 40)
    at = ("--max-drop", "4", "--workers", "0")
    assert verify(artifacts, *at, data=digits).exit_code == 0
    (artifacts / cards.DEMO / "verification.jsonl").unlink()
    result = verify(artifacts, *at, "--json", data=rotated(digits))
    assert result.exit_code == 3
    assert "on a sample of the images: stopped" in result.stderr
    found = json.loads(result.stdout)
    assert found["images"] == 40
    assert found["baseline"]["status"] == "implausible"
    assert [row["verdict"] for row in found["rows"]] == ["not executed"]
    assert "first look" in found["rows"][0]["reason"]
    assert kept(artifacts) == []


def test_a_failed_baseline_names_its_cause(artifacts: Path, digits: Path) -> None:
    at = ("--max-drop", "4", "--workers", "0")
    result = verify(artifacts, *at, data=rotated(digits))
    assert result.exit_code == 3
    shown = " ".join(result.stdout.split())
    assert "NOT JUDGED" in shown
    assert "likely cause: some other order of the classes" in shown
    assert "EQUIVALENT" not in shown
    # The shards of such a run come to the same.
    for part in ("1/2", "2/2"):
        assert verify(artifacts, *at, "--shard", part, data=digits).exit_code == 0
    merged = merge(artifacts, "--max-drop", "4")
    assert merged.exit_code == 3
    assert merged.stdout == result.stdout


def test_damaged_results_are_told_or_done_again(artifacts: Path) -> None:
    first = verify(artifacts, *FEW, "--json")
    path = artifacts / cards.DEMO / "verification.jsonl"
    path.write_bytes(path.read_bytes()[: len(first.stdout) // 2] + b"\x00\n{}\n")
    assert verify(artifacts, *FEW, "--json").stdout == first.stdout
    for part in ("1/2", "2/2"):
        verify(artifacts, *FEW, "--shard", part)
    shard = artifacts / cards.DEMO / "verification.2-of-2.jsonl"
    shard.write_bytes(b"damaged\n")
    refused(merge(artifacts), 1, "verification.2-of-2.jsonl", "is not a readable results file")
