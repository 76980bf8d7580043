"""Shards over a real Ray cluster of this machine, with processes and nodes killed midway."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result
from interrupts import hear_interrupts

from clipdeploy.cli.main import main
from clipdeploy.core.errors import ClusterError, UsageError
from clipdeploy.models import cards
from clipdeploy.stages.cluster import Allocation, ClusterConfig, Shard, ShardJob, shards_on_cluster
from clipdeploy.verification.results import read_results
from clipdeploy.workspace.folder import Workspace

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TEST = str(cards.demo_file("test.zip"))
CALIBRATION = str(cards.demo_file("calibration.zip"))
# For a machine that does other things as well; nothing is judged by time.
PATIENCE = 240

VERIFY = (
    "verify",
    f"artifacts/{cards.DEMO}/int8.onnx",
    "--data",
    TEST,
    "--images",
    "64",
)
CALIBRATE = ("calibrate", "--data", CALIBRATION, "--images", "32")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with one each."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes.add_node(num_cpus=1)
    nodes.add_node(num_cpus=1)
    yield nodes
    nodes.shutdown()
    ray.shutdown()


@pytest.fixture
def folder(demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a workspace; the commands name it by a relative path."""
    shutil.copytree(demo_workspace.root, tmp_path / "artifacts")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifacts" / cards.DEMO


def here(*words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--model", "demo", "--json"])


def on_cluster(address: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clipdeploy", *words, "--model", "demo", "--json"]
    return subprocess.Popen(
        [*command, "--ray", address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


def wait_for(what: Callable[[], object], run: subprocess.Popen[str] | None = None) -> None:
    """Until ``what`` is true; for a run that ends before it is, its errors are shown."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert run is None or run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline, "it never came"
        # Looking through /proc takes processor time from what is waited for.
        time.sleep(0.05)


def workers_on(task: str, parent: int | None = None) -> list[int]:
    """The processes that Ray has renamed for the task that they are on."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes()
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended in between
            continue
        if title.startswith(f"ray::{task}".encode()) and parent in (None, int(fields[1])):
            found.append(int(process.name))
    return found


def shards(folder: Path, stage: str) -> list[Path]:
    return sorted(folder.glob(f"{stage}.*-of-*"))


def one_done_and_one_at_work(folder: Path, stage: str, task: str) -> bool:
    return bool(shards(folder, stage)) and bool(workers_on(task))


@pytest.mark.slow
def test_interrupted_then_a_worker_killed(cluster: Cluster, folder: Path) -> None:
    alone = here(*VERIFY)
    assert alone.exit_code in (0, 3), alone.output
    records = (folder / "verification.jsonl").read_bytes()
    (folder / "verification.jsonl").unlink()

    first = on_cluster(cluster.address, *VERIFY)
    wait_for(lambda: one_done_and_one_at_work(folder, "verification", "verify"), first)
    first.send_signal(signal.SIGINT)
    stdout, stderr = first.communicate(timeout=PATIENCE)
    assert (first.returncode, stdout) == (130, ""), stderr
    assert "run the same command again to continue" in stderr
    wait_for(lambda: not workers_on("verify"))
    kept = shards(folder, "verification")
    assert 1 <= len(kept) < 4
    assert not (folder / "verification.jsonl").exists()
    assert {batch.batch % 4 for path in kept for batch in read_results(path).batches} == {
        int(path.name.split(".")[1].split("-")[0]) - 1 for path in kept
    }

    second = on_cluster(cluster.address, *VERIFY)
    wait_for(lambda: workers_on("verify"), second)
    os.kill(workers_on("verify")[0], signal.SIGKILL)
    stdout, stderr = second.communicate(timeout=PATIENCE)
    assert second.returncode == alone.exit_code, stderr
    assert "64 images in 4 shards, 2 at once on 2 nodes" in stderr
    assert stdout == alone.stdout
    assert (folder / "verification.jsonl").read_bytes() == records
    assert shards(folder, "verification") == []


@pytest.mark.slow
def test_a_bad_image_is_told_in_one_line(cluster: Cluster, folder: Path) -> None:
    with zipfile.ZipFile(TEST) as archive:
        archive.extractall(folder.parent / "digits")
    for image in (folder.parent / "digits").rglob("*.png"):
        image.write_bytes(b"no image")
    words = (*VERIFY[:2], "--data", str(folder.parent / "digits"), "--images", "64")
    run = on_cluster(cluster.address, *words)
    stdout, stderr = run.communicate(timeout=PATIENCE)
    assert (run.returncode, stdout) == (1, ""), stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert ".png" in last
    assert "Traceback" not in stderr
    assert not (folder / "verification.jsonl").exists()


def job(folder: Path, run: Callable[[Shard, int, Path], object], *reads: Path) -> ShardJob:
    return ShardJob("job", run, lambda s: folder / "part.{}-of-{}".format(*s), 2, reads, threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "reads", "message"),
    [
        # By value: a worker cannot import this file.
        (lambda shard, threads, path: os._exit(1), ".", r"shard ./2 was lost in 4 attempts: "),
        (
            lambda shard, threads, path: path.touch(),
            "no such folder",
            r"cannot access /.*/no such folder \(",
        ),
    ],
)
def test_what_no_worker_can_do(
    cluster: Cluster,
    tmp_path: Path,
    run: Callable[[Shard, int, Path], object],
    reads: str,
    message: str,
) -> None:
    with (
        pytest.raises(ClusterError, match=message),
        shards_on_cluster(ClusterConfig(cluster.address), job(tmp_path, run, tmp_path / reads)),
    ):
        pytest.fail("there is nothing to merge")
    assert shards(tmp_path, "part") == []


@pytest.mark.slow
def test_a_node_lost_midway(cluster: Cluster, folder: Path) -> None:
    """The last test of the cluster: one node is left of it."""
    table = folder / "calibration.json"
    alone = here(*CALIBRATE, "--force")
    assert alone.exit_code == 0, alone.output
    wanted = table.read_bytes()
    table.unlink()
    run = on_cluster(cluster.address, *CALIBRATE)
    lost = next(iter(cluster.worker_nodes))
    raylet = lost.all_processes["raylet"][0].process.pid
    wait_for(lambda: workers_on("calibrate", raylet), run)
    cluster.remove_node(lost, allow_graceful=False)
    stdout, stderr = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, stderr
    assert stdout == alone.stdout
    assert table.read_bytes() == wanted
    assert shards(folder, "calibration") == []


def node(cpus: float, gpus: float = 0, *, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, "GPU": gpus} if cpus else {}}


def test_a_shard_takes_a_cpu_for_each_thread() -> None:
    nodes = [node(0), node(16), node(8), node(2), node(16, alive=False)]
    assert Allocation.of(nodes, 4, gpu=True) == Allocation(cpus=4, gpus=0, slots=6, nodes=2)
    # More threads than any node has CPUs: as many threads all the same, on a node alone.
    assert Allocation.of(nodes, 32, gpu=False) == Allocation(cpus=16, gpus=0, slots=1, nodes=1)
    assert Allocation.of([node(0)], 4, gpu=False).slots == 0


def test_a_shard_that_can_use_a_gpu_takes_one() -> None:
    nodes = [node(32, 4), node(64)]
    assert Allocation.of(nodes, 16, gpu=True) == Allocation(cpus=8, gpus=1, slots=4, nodes=1)
    assert Allocation.of(nodes, 16, gpu=False) == Allocation(cpus=16, gpus=0, slots=6, nodes=2)


@pytest.mark.parametrize("address", ["", "host", "host:", ":6379", "ray://host:1", "host:99999"])
def test_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="not the address of a Ray cluster"):
        ClusterConfig(address)


def test_nothing_answers(folder: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    # Port 1 is reserved, and nothing listens there.
    result = here(*CALIBRATE, "--force", "--ray", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "error: no answer from 127.0.0.1:1" in result.stderr
    assert result.stdout == ""


def test_ray_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = here(*CALIBRATE, "--force", "--ray", "local")
    assert result.exit_code == 1
    assert 'error: Ray is not installed (pip install "clipdeploy[ray]"' in result.stderr


@pytest.mark.parametrize("words", [(*VERIFY, "--sequential"), (*VERIFY, "--shard", "1/2")])
def test_a_cluster_cuts_its_own_shards(words: tuple[str, ...], folder: Path) -> None:
    result = here(*words, "--ray", "local")
    assert result.exit_code == 2
    assert "leave out --sequential and --shard, or --ray" in result.stderr
