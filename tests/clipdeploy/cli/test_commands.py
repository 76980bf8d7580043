"""The commands as a user types them, and what they say to bad input.

Covers: clipdeploy/cli/bisect.py, clipdeploy/cli/common.py, clipdeploy/cli/demo.py,
    clipdeploy/cli/export.py, clipdeploy/cli/inspect.py, clipdeploy/cli/labelling.py,
    clipdeploy/cli/params.py, clipdeploy/cli/quantize.py, clipdeploy/cli/search.py,
    clipdeploy/cli/shared_options.py, clipdeploy/cli/zoo.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_legacy_flat, write_nested_zip
from click.testing import CliRunner, Result
from command_server import Command, CommandProgram, CommandServer
from interrupts import hear_interrupts
from safetensors.torch import load_file

from clipdeploy.cli.main import main
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

CALIBRATION = str(cards.demo_file("calibration.zip"))
TEST = str(cards.demo_file("test.zip"))


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr, the exit code, nothing on stdout, and the words that help."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in errors[0]


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """The calibration digits as a folder."""
    with zipfile.ZipFile(CALIBRATION) as archive:
        archive.extractall(tmp_path / "digits")
    return tmp_path / "digits"


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or not [path for path in folder.rglob("*") if path.is_file()]


def test_zoo_lists_every_card() -> None:
    listed = json.loads(run("zoo", "list", "--json").stdout)
    assert [card["name"] for card in listed] == [card.name for card in cards.all_cards()]
    shown = run("zoo", "show", "clip-vit-base-p16").stdout
    assert "clip-vit-base-p16_laion2b-in12k-pre_3rdparty_in1k" in shown
    assert "86.02" in shown


def test_the_three_commands(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    at = ("--workspace", tmp_path / "artifacts")
    exported = run("export", "--model", "demo", *at)
    assert exported.exit_code == 0, exported.output
    assert "fp32.onnx" in exported.stdout
    built = run("build-engine", "--int8", "--data", CALIBRATION, *at)
    assert built.exit_code == 0, built.output
    assert "model: clip-vit-demo (the last one of" in built.stderr
    few = ("--images", "24", "--max-drop", "30")
    verified = run("verify", "--data", TEST, *few, "--graphs-only", "--json", *at)
    assert verified.exit_code == 0, verified.output
    result = json.loads(verified.stdout)
    assert result["passed"] is True
    assert [row["precision"] for row in result["rows"]] == ["fp32", "int8"]
    engine = tmp_path / "artifacts/clip-vit-demo/int8.engine"
    inspected = run("inspect", engine, "--json")
    assert json.loads(inspected.stdout)["engine"]["backend"] == "tensorrt-rtx"


def test_an_engine_that_did_not_run_is_no_pass(artifacts: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    from clipdeploy.core.device import gpus

    if gpus():
        pytest.skip("the engine can run here")
    assert run("build-engine", "--fp16", "--workspace", artifacts).exit_code == 0
    result = run("verify", "--data", TEST, "--images", "20", "--workspace", artifacts)
    assert result.exit_code == 3
    assert "fp16 engine" in result.stdout
    assert "fp16.onnx was scored instead" in " ".join(result.stdout.split())


def test_an_undecided_verdict_exits_with_three(artifacts: Path) -> None:
    at = ("--workspace", artifacts, "--data", TEST, "--images", "20")
    result = run("verify", *at)
    assert result.exit_code == 3
    assert "UNDECIDED: about" in result.stdout
    # Twenty images without a difference prove a drop below 16.1 points.
    assert run("verify", *at, "--max-drop", "17").exit_code == 0
    assert run("verify", *at, "--max-drop", "-1").exit_code == 2


def test_random_weights_get_no_verdict(tmp_path: Path, digits: Path) -> None:
    at = ("--workspace", tmp_path / "artifacts")
    assert run("export", "--model", "demo", "--random-init", "0", *at).exit_code == 0
    result = run("verify", "--data", digits, "--images", "10", *at)
    assert result.exit_code == 3
    assert "NOT JUDGED: random weights have no accuracy" in result.stdout


def test_unknown_model(tmp_path: Path) -> None:
    result = run("export", "--model", "clip-vit-bas-p16", "--workspace", tmp_path / "a")
    refused(result, 2, "'clip-vit-bas-p16'", "nearest: ", "clip-vit-base-p16")
    assert nothing_left(tmp_path)


def test_checkpoint_and_random_init_exclude_each_other(tmp_path: Path) -> None:
    words = ("--checkpoint", "x.pth", "--random-init", "1", "--workspace", tmp_path / "a")
    refused(run("export", "--model", "demo", *words), 2, "--checkpoint", "--random-init")


def test_truncated_checkpoint(tmp_path: Path) -> None:
    tensors = load_file(cards.demo_file("weights.safetensors"))
    for write in (write_legacy_flat, write_nested_zip):
        path = write(tensors, tmp_path / f"{write.__name__}.pth")
        path.write_bytes(path.read_bytes()[:-100_000])
        at = ("--workspace", tmp_path / "a", "--checkpoint", path)
        refused(run("export", "--model", "demo", *at), 1, str(path), "truncated")
        assert nothing_left(tmp_path / "a")


def test_misfit_checkpoint_names_every_tensor(tmp_path: Path) -> None:
    tensors = load_file(cards.demo_file("weights.safetensors"))
    del tensors["blocks.3.attn.proj.bias"]
    tensors["blocks.3.attn.extra"] = torch.zeros(2)
    tensors["norm.bias"] = torch.zeros(95)
    path = write_nested_zip(tensors, tmp_path / "misfit.pth")
    at = ("--workspace", tmp_path / "a", "--checkpoint", path)
    result = run("export", "--model", "demo", *at)
    refused(result, 1, "blocks.3.attn.proj.bias", "layers.3.attn.extra", "norm.bias is (95,)")
    assert nothing_left(tmp_path / "a")


def test_calibration_folder_without_an_image(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (artifacts / cards.DEMO / "calibration.json").unlink()
    result = run("calibrate", "--data", tmp_path / "empty", "--workspace", artifacts)
    refused(result, 1, "contains no images")
    assert not (artifacts / cards.DEMO / "calibration.json").exists()


def test_a_broken_jpeg_is_named_and_skipped_only_on_request(artifacts: Path, digits: Path) -> None:
    (digits / "3" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more of it")
    table = artifacts / cards.DEMO / "calibration.json"
    table.unlink()
    refused(
        run("calibrate", "--data", digits, "--workspace", artifacts),
        1,
        "3/broken.jpg",
        "--skip-unreadable",
    )
    assert not table.exists()
    result = run("calibrate", "--data", digits, "--workspace", artifacts, "--skip-unreadable")
    assert result.exit_code == 0
    assert "skipped, unreadable: 3/broken.jpg" in result.stderr
    assert len(json.loads(table.read_text())["images"]) == 200
    (artifacts / cards.DEMO / "int8.onnx").unlink()
    verified = run("verify", "--data", digits, "--workspace", artifacts)
    refused(verified, 1, "3/broken.jpg")


def test_a_label_folder_that_is_no_class(artifacts: Path, digits: Path) -> None:
    (digits / "7").rename(digits / "seven")
    refused(run("verify", "--data", digits, "--workspace", artifacts), 1, "not classes: seven")


def unwritable_by_us(folder: Path) -> bool:
    try:
        (folder / "probe").touch()
    except OSError:
        return True
    (folder / "probe").unlink()
    return False


def test_no_write_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # The superuser may write anywhere but beneath a file and into /proc.
    folder = locked if unwritable_by_us(locked) else Path("/proc/clipdeploy")
    result = run("export", "--model", "demo", "--workspace", folder / "artifacts")
    refused(result, 1, f"cannot write {folder}")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("export", "--model", "demo", "--workspace", tmp_path / "file" / "artifacts")
    refused(result, 1, "cannot write", "is a file, not a folder")
    assert (tmp_path / "file").read_text() == "in the way"


EXPORT = [sys.executable, "-m", "clipdeploy", "export", "--model", "demo", "--workspace"]


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    # A file system of one megabyte, in a mount namespace of its own; the graph needs 2.7.
    script = 'mount -t tmpfs -o size=1m tmpfs "$0" && "$@"; code=$?; find "$0" -type f; exit $code'
    words = ["unshare", "-rm", "sh", "-c", script, str(disk), *EXPORT, str(disk / "artifacts")]
    if not shutil.which("unshare") or b"permit" in _mount_probe(disk):
        pytest.skip("this machine lets nobody mount a small file system")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: cannot write" in done.stderr
    assert "the disk is full" in done.stderr
    assert done.stdout == ""


def _mount_probe(disk: Path) -> bytes:
    words = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    done = subprocess.run(words, capture_output=True, check=False)
    return b"not permitted" if done.returncode else b""


def test_a_file_that_may_not_grow(commands: CommandServer, tmp_path: Path) -> None:
    out, err = tmp_path / "out", tmp_path / "err"
    words = (*EXPORT[3:], str(tmp_path / "artifacts"))
    command = Command(words, str(tmp_path), str(out), str(err), largest_file=1_000_000)
    assert commands.with_env(dict(os.environ)).run(command) == 1
    assert "error: cannot write" in err.read_text()
    assert out.read_text() == ""
    assert nothing_left(tmp_path / "artifacts")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("moment", ["load", "trace", "check the graph"])
def test_an_interrupt_leaves_nothing_half_done(
    moment: str, program: CommandProgram, tmp_path: Path
) -> None:
    artifacts = tmp_path / "artifacts"
    # The program's trace takes no time; a process of its own can be interrupted in it.
    export = EXPORT if moment == "trace" else [*program.words, *EXPORT[3:]]
    process = subprocess.Popen(
        [*export, str(artifacts)],
        preexec_fn=hear_interrupts,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(moment):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130, rest
    assert "interrupted" in rest
    assert "Traceback" not in rest
    assert nothing_left(artifacts)
    assert run("export", "--model", "demo", "--workspace", artifacts).exit_code == 0


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("export", "--model", "no", "--debug", "--workspace", tmp_path)
    assert result.exception is not None
    assert "unknown model 'no'" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("export",), "sha256"),
        (("calibrate", "--data", CALIBRATION), "images"),
        (("quantize",), "placement"),
        (("build-engine", "--fp16"), "passport"),
        (("verify", "--data", TEST, "--max-drop", "30", "--images", "10", "--graphs-only"), "rows"),
    ],
)
def test_json_is_all_that_stdout_holds(words: tuple[str, ...], key: str, artifacts: Path) -> None:
    if words[0] == "build-engine":
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    result = run(*words, "--model", "demo", "--json", "--workspace", artifacts)
    assert result.exit_code == 0, result.output
    assert key in json.loads(result.stdout)


def test_export_options_reach_the_graph(tmp_path: Path) -> None:
    at = ("--model", "demo", "--workspace", tmp_path / "a", "--json")
    result = run(
        "export", *at, "--fixed-batch", "2", "--preprocess", "--opset", "18", "--resize", "timm"
    )
    assert result.exit_code == 0, result.output
    passport = json.loads(result.stdout)["passport"]
    assert passport["input"] == {"name": "image", "dtype": "uint8", "shape": [2, 32, 32, 3]}
    assert passport["settings"] == {"opset": 18, "batch": 2, "preprocess": True}
    assert passport["recipe"]["resize"] == "timm"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "--model", "demo", "--opset", "16"), "invalid value 16 for --opset"),
        (("export", "--model", "demo", "--fixed-batch", "0"), "invalid value 0 for --fixed-batch"),
        (("build-engine", "--int8", "--fp16-io"), "--fp16-io belongs to --fp16"),
        (
            ("export", "--model", "demo", "--checkpoint", "hf://timm"),
            "is not a Hugging Face repository",
        ),
    ],
)
def test_wrong_options_are_usage_errors(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    refused(run(*words, "--workspace", tmp_path / "a"), 2, said)
    assert nothing_left(tmp_path)


def test_offline_without_the_weights(tmp_path: Path) -> None:
    words = ("--model", "clip-vit-base-p32", "--offline", "--workspace", tmp_path / "a")
    refused(run("export", *words), 1, "not in the cache and downloads are off", "--checkpoint")
    assert nothing_left(tmp_path)


def test_zoo_show_says_what_each_recipe_changes() -> None:
    shown = run("zoo", "show", "clip-vit-base-p16-384px").stdout
    assert "position grid 24x24 resized to 14x14 and back" in shown
    assert "--resize timm" in shown
    # At 224 px nothing is resized.
    assert "resized" not in run("zoo", "show", "clip-vit-base-p16").stdout
