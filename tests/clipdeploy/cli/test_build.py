"""``build-engine`` and ``inspect`` as a user types them; the engines are real.

Covers: clipdeploy/workspace/inspection.py.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from command_server import Command, CommandServer
from interrupts import hear_interrupts

from clipdeploy.cli.main import main
from clipdeploy.core.device import gpus
from clipdeploy.core.errors import ArtifactError, FileError, GraphError
from clipdeploy.engines.builder import build_engine
from clipdeploy.engines.passport import load_engine_passport, passport_path
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
without_gpu = pytest.mark.skipif(bool(gpus()), reason="what happens where there is no GPU")


BUILD = [sys.executable, "-m", "clipdeploy", "build-engine", "--model", cards.DEMO, "--workspace"]


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def artifacts(demo_workspace: Workspace, tmp_path: Path) -> Path:
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    return tmp_path / "artifacts"


@pytest.fixture(scope="module")
def built(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an FP16 engine.  Read only."""
    root = tmp_path_factory.mktemp("built") / "artifacts"
    shutil.copytree(demo_workspace.root, root)
    assert "built in" in build(root).stdout
    return root


@pytest.fixture
def with_fp16(built: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(built, tmp_path / "artifacts")
    return tmp_path / "artifacts"


def build(artifacts: Path, *words: str) -> Result:
    return run("build-engine", "--model", cards.DEMO, "--workspace", artifacts, *words)


def engine(artifacts: Path, precision: str = "fp16") -> Path:
    return artifacts / cards.DEMO / f"{precision}.engine"


def refused(result: Result, artifacts: Path, *words: str, code: int = 1) -> None:
    """One line that says all of ``words``, and no engine."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for word in words:
        assert word in errors[0]
    assert not list(artifacts.rglob("*.engine*"))


def test_options_reach_the_engine_and_its_passport(artifacts: Path) -> None:
    words = ("--profile", "1,1,1", "--profile", "2,8,16", "--compute-capability", "8.9")
    result = build(artifacts, "--int8", "--memory-pool", "256", *words, "--json")
    assert result.exit_code == 0, result.output
    passport = json.loads(result.stdout)["passport"]
    assert passport["profiles"] == [[1, 1, 1], [2, 8, 16]]
    assert passport["capabilities"] == ["8.9"]
    assert passport["settings"]["memory_pool_mib"] == 256
    hashes = passport["hashes"]
    assert all(hashes[role] for role in ("plan", "graph", "source_graph", "calibration"))
    assert hashes["checkpoint"] == passport["graph"]["weights"]["sha256"]
    assert passport["graph"]["class_names"] == [str(digit) for digit in range(10)]
    assert load_engine_passport(engine(artifacts, "int8")).batches == (1, 16)


def test_an_unchanged_engine_answers_at_once(with_fp16: Path) -> None:
    artifacts = with_fp16
    built = engine(artifacts).stat().st_mtime_ns
    again = build(artifacts)
    assert "unchanged" in again.stdout
    assert "build the" not in again.stderr
    assert engine(artifacts).stat().st_mtime_ns == built
    # A setting that changes, and --force, are reasons to build.
    assert "built in" in build(artifacts, "--max-batch", "16").stdout
    assert "built in" in build(artifacts, "--max-batch", "16", "--force").stdout


@pytest.mark.parametrize("spoilt", ["engine", "passport", "missing"])
def test_an_engine_without_a_valid_passport_is_built_again(spoilt: str, with_fp16: Path) -> None:
    path = engine(with_fp16)
    if spoilt == "engine":
        path.write_bytes(path.read_bytes()[:-1])
    elif spoilt == "passport":
        passport_path(path).write_text("{")
    else:
        passport_path(path).unlink()
    assert "built in" in build(with_fp16).stdout
    assert load_engine_passport(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--min-batch", "9"), ("9, 8, 32", "--min-batch <= --opt-batch")),
        (("--profile", "4,2,1"), ("4, 2, 1", "not in order")),
        (("--profile", "1,8"), ("'1,8'", "1,8,32")),
        (("--profile", "one"), ("'one'", "MIN,OPT,MAX")),
        (("--optimization-level", "9"), ("9", "0 to 5")),
        (("--memory-pool", "0"), ("invalid value 0 for --memory-pool",)),
        (("--compute-capability", "Ada"), ("'Ada'", "8.9")),
        (("--int8", "--fp16-io"), ("--fp16-io belongs to --fp16",)),
    ],
)
def test_wrong_options_are_usage_errors(
    words: tuple[str, ...], said: tuple[str, ...], artifacts: Path
) -> None:
    refused(build(artifacts, *words), artifacts, *said, code=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--hardware-compatible", "ampere-plus"), ("--compute-capability", "8.9")),
        (("--version-compatible",), ("lean runtime", "--backend tensorrt")),
        (("--optimization-level", "5"), ("kernels at load time",)),
        (("--compute-capability", "9.0"), ("9.0", "12.0", "--backend tensorrt")),
        (("--backend", "tensorrt"), ("tensorrt",)),
    ],
)
def test_what_the_backend_cannot_do_is_said_before_the_build(
    words: tuple[str, ...], said: tuple[str, ...], artifacts: Path
) -> None:
    result = build(artifacts, *words)
    refused(result, artifacts, *said)
    assert "build the fp16 engine" not in result.stderr


@without_gpu
@pytest.mark.parametrize("option", ["--strip-weights", "--refittable"])
def test_what_needs_a_gpu_is_tried_before_the_build(option: str, artifacts: Path) -> None:
    result = build(artifacts, option)
    refused(result, artifacts, option, "without a GPU", "--backend tensorrt")
    assert "build the fp16 engine" not in result.stderr


def test_tensorrt_s_own_reason_is_told(artifacts: Path) -> None:
    result = build(artifacts, "--memory-pool", "1")
    refused(result, artifacts, "cannot compile", "workspace limit", "--debug")


def in_background(folder: Path, *words: str) -> Command:
    """Build in a process of its own, for the workspace ``artifacts`` in ``folder``."""
    name = ("build-engine", "--model", cards.DEMO, "--workspace", "artifacts", *words)
    return Command(name, str(folder), str(folder / "stdout"), str(folder / "stderr"))


def small_disk(engine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Build the demo's FP16 graph to ``engine`` with ``words`` in front of the interpreter."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from clipdeploy.engines.builder import build_engine\n"
        "build_engine(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    graph = engine.parents[1] / "artifacts" / cards.DEMO / "fp16.onnx"
    command = [*words, sys.executable, "-c", code, str(graph), str(engine)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_full_disk_leaves_no_engine(artifacts: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0"'
    probe = ["unshare", "-rm", "sh", "-c", mount, str(disk)]
    if not shutil.which("unshare") or subprocess.run(probe, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small file system")
    script = f'{mount} && "$@"; find "$0" -type f'
    done = small_disk(disk / "x.engine", "unshare", "-rm", "sh", "-c", script, str(disk))
    assert "FileError: cannot write" in done.stderr
    assert "the disk is full" in done.stderr
    assert done.stdout == ""


def test_a_file_that_may_not_grow_leaves_no_engine(
    artifacts: Path, commands: CommandServer, tmp_path: Path
) -> None:
    # The engine has 5 MB; as with `ulimit -f 3000`.
    command = in_background(tmp_path)
    assert commands.run(replace(command, largest_file=3000 * 1024)) == 1
    assert "the file size limit is exceeded" in Path(command.err).read_text()
    assert not list(artifacts.rglob("*.engine*"))
    assert commands.run(command) == 0
    assert engine(artifacts).stat().st_size > 3000 * 1024


def test_a_folder_that_cannot_be_written_is_told_before_the_build(artifacts: Path) -> None:
    # The superuser may write anywhere but into /proc.
    graph = artifacts / cards.DEMO / "fp16.onnx"
    started = []

    class Listening:
        def task(self, text: str, total: int | None = None) -> None:
            started.append(text)

    with pytest.raises(FileError, match=r"cannot write /proc/x\.engine"):
        build_engine(graph, Path("/proc/x.engine"), progress=Listening())  # type: ignore[arg-type]
    assert not started


def classifier(path: Path) -> Path:
    """A graph that clipdeploy did not write: an image goes in, and no logits come out."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    image = helper.make_tensor_value_info("x", kind, ["n", 3, 8, 8])
    masks = helper.make_tensor_value_info("y", kind, ["n", 3, 8, 8])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [image], [masks])
    onnx.save(helper.make_model(graph, ir_version=10), path)
    return path


def test_a_graph_that_is_no_classifier_of_ours(tmp_path: Path) -> None:
    graph = classifier(tmp_path / "segmenter.onnx")
    with pytest.raises(ArtifactError, match=r"segmenter\.onnx has no passport"):
        build_engine(graph, tmp_path / "segmenter.engine")
    assert [path.name for path in tmp_path.iterdir()] == ["segmenter.onnx"]


def test_a_graph_that_asks_for_what_the_target_lacks(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    from clipdeploy.core.errors import BuildError

    model = onnx.load(demo_workspace.graph(cards.DEMO, "int8"))
    for weight in model.graph.initializer:
        if weight.data_type == onnx.TensorProto.INT8:
            zeros = np.zeros(list(weight.dims), np.uint8).tobytes()
            weight.data_type, weight.raw_data = onnx.TensorProto.FLOAT8E4M3FN, zeros
    graph = tmp_path / "fp8.onnx"
    onnx.save(model, graph)
    from clipdeploy.engines.build_config import BuildConfig

    with pytest.raises(BuildError, match=r"uses fp8, which SM 8\.0 cannot compute"):
        build_engine(graph, tmp_path / "x.engine", BuildConfig(compute_capability=("8.0", "8.9")))


def test_killed_at_random_moments(artifacts: Path, commands: CommandServer, tmp_path: Path) -> None:
    """After every kill the next command builds, and never takes what it finds for an engine."""
    started = time.perf_counter()
    assert commands.run(in_background(tmp_path)) == 0
    whole = time.perf_counter() - started
    path, moments = engine(artifacts), random.Random(0)
    believed = 0
    for _ in range(8):
        path.unlink(missing_ok=True)
        passport_path(path).unlink(missing_ok=True)
        killed = replace(
            in_background(tmp_path, "--force"), kill_after=moments.uniform(0.1, 1.0) * whole
        )
        assert commands.run(killed) in (0, -signal.SIGKILL)
        try:
            load_engine_passport(path)
            believed += 1
        except (ArtifactError, GraphError):
            assert not (path.exists() and passport_path(path).exists())
    # Some were killed before the end; otherwise this tested nothing.
    assert believed < 8
    assert build(artifacts).exit_code == 0
    assert load_engine_passport(path)


def test_an_interrupted_build_leaves_nothing(artifacts: Path) -> None:
    process = subprocess.Popen(
        [*BUILD, str(artifacts)],
        preexec_fn=hear_interrupts,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "build the fp16 engine" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
    folder = engine(artifacts).parent
    assert not [path for path in folder.iterdir() if "engine" in path.name or ".part" in path.name]


@pytest.mark.parametrize("width", ["80", "160"])
def test_inspect_an_engine(
    width: str, engine_workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    shown = run("inspect", engine(engine_workspace, "int8")).stdout
    for word in ("clip-vit-demo, int8", "tensorrt-rtx", "1 to 32, tuned for 8", "SHA-256"):
        assert word in shown
    assert "blocks.0 to 5  4 int8           2 fp16" in shown
    assert max(len(line) for line in shown.splitlines()) <= int(width)


@without_gpu
def test_without_a_gpu_inspect_does_not_speak_for_the_engine(engine_workspace: Path) -> None:
    path = engine(engine_workspace, "int8")
    result = json.loads(run("inspect", path, "--json").stdout)
    assert result["executed"] is None
    assert result["note"] == "the engine was not queried: no GPU on this machine"
    # TensorRT-RTX lists what it compiled, and here it is what was asked for.
    assert result["compiled"]["blocks"] == result["asked"]
    assert result["fallbacks"] == []
    assert "not confirmed by the engine" in run("inspect", path).stdout
    assert result["asked"][1] == {
        "block": "blocks.0",
        "gemms": {"int8": 4},
        "attention": {"fp16": 2},
    }


def test_a_linear_that_silently_left_int8_is_told(artifacts: Path) -> None:
    """Weight scales along the input axis: accepted, dequantised, and multiplied in float16."""
    graph = artifacts / cards.DEMO / "int8.onnx"
    model = onnx.load(graph)
    for node in model.graph.node:
        if node.name == "blocks.3.mlp.fc1/weight_DQ":
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", 0))
            scale = next(w for w in model.graph.initializer if w.name == node.input[1])
            weight = next(w for w in model.graph.initializer if w.name == node.input[0])
            scale.raw_data = np.full(weight.dims[0], 0.01, np.float16).tobytes()
            scale.dims[:] = [weight.dims[0]]
    spoilt = artifacts / "spoilt.onnx"
    onnx.save(model, spoilt)
    passport = build_engine(spoilt, artifacts / "spoilt.engine").passport
    assert passport.fallbacks == ("blocks.3: asked for 4 int8, got 3 int8, 1 fp16",)
    shown = run("inspect", artifacts / "spoilt.engine").stdout
    assert "NOT AS REQUESTED: blocks.3: asked for 4 int8, got 3 int8, 1 fp16" in shown


def test_inspect_a_graph(artifacts: Path) -> None:
    shown = run("inspect", artifacts / cards.DEMO / "fp16.onnx").stdout
    assert "blocks.0 to 5  4 fp16           2 fp16" in shown
    assert "as written in the graph" in shown


def test_inspect_a_graph_that_nothing_vouches_for(tmp_path: Path) -> None:
    result = run("inspect", classifier(tmp_path / "foreign.onnx"))
    assert result.exit_code == 0
    assert "has no passport" in " ".join(result.stdout.split())


def test_inspect_refuses_what_it_cannot_vouch_for(with_fp16: Path, tmp_path: Path) -> None:
    path = engine(with_fp16)
    path.write_bytes(path.read_bytes() + b"x")
    assert "changed or replaced" in run("inspect", path).stderr
    assert run("inspect", path, "--trust").exit_code == 0
    (tmp_path / "notes.txt").write_text("x")
    assert run("inspect", tmp_path / "notes.txt").exit_code == 2
    assert "cannot read" in run("inspect", tmp_path / "gone.engine").stderr
