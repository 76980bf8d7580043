"""Shards as tasks of a Ray cluster, or of this machine.

    this process                          a worker
    the shards        -- Ray tasks -->    does one shard in a folder of its own
    the shard's file  <-- its bytes --    gives the file's content

Ray does a shard again when its process or its node dies.  Workers write nothing that others see:
an attempt that was given up for lost, and was not, cannot spoil the one that took its place.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from clipdeploy.core.errors import ClipdeployError, ClusterError, UsageError, first_line
from clipdeploy.core.files import file_errors, write_atomic
from clipdeploy.core.leftovers import scratch_folder
from clipdeploy.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from ray import ObjectRef

__all__ = ["ClusterConfig", "Shard", "ShardJob", "shards_on_cluster"]

Shard = tuple[int, int]

_LOCAL, _AUTO = "local", "auto"
_SHARDS_PER_SLOT = 4
# Deaths that one shard survives; what kills a fourth process is the shard itself.
_RETRIES = 3
_ANSWER_SECONDS = 5.0
# Two for the answer, the others to start Python on a busy machine.
_HEALTH_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_START = "`ray start --head` starts one and says its address; --ray local needs none"


@dataclass(frozen=True)
class ClusterConfig:
    """``address``: HOST:PORT of a Ray cluster, or ``auto`` or ``local``.

    ``auto`` is the one that this machine belongs to, ``local`` one that is started here and stopped
    afterwards.

    Raises:
        UsageError: it is no address.
    """

    address: str = _LOCAL

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        # Python reads no more than some thousand digits.
        digits = port.isdecimal() and len(port) < 6
        named = bool(host) and colon == ":" and digits and int(port) < 1 << 16
        if self.address not in (_LOCAL, _AUTO) and ("/" in host or not named):
            raise UsageError(
                f"{self.address[:60]!r} is no address of a Ray cluster",
                hint="--ray HOST:6379 on a machine of the cluster, --ray auto, or --ray local",
            )


@dataclass(frozen=True)
class ShardJob:
    """Work that can be cut into at most ``most`` shards.

    ``run`` does shard (i, n) with so many threads and writes its file to the given path, where
    what an earlier run left of it may lie.  ``file`` is where the shard's file goes in the end.
    Both are pickled.  ``reads`` are the paths that ``run`` needs, ``gpu`` says that it takes one
    where there is one.  ``threads`` 0 are as many as PyTorch takes here.
    """

    title: str
    run: Callable[[Shard, int, Path], object]
    file: Callable[[Shard], Path]
    most: int
    reads: tuple[Path, ...]
    threads: int = 0
    gpu: bool = False


@dataclass(frozen=True)
class Plan:
    """What a shard takes of a node, and how many run at once on how many nodes."""

    cpus: int
    gpus: int
    slots: int
    nodes: int

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], threads: int, *, gpu: bool) -> Plan:
        """For ``nodes`` as ``ray.nodes()`` lists them.

        A shard takes a CPU for each thread, or all of the largest node if that has fewer; with
        ``gpu``, a GPU wherever a node has any.  Nodes that are too small have no slot.
        """
        found = [node["Resources"] for node in nodes if node["Alive"]]
        with_gpu = [node for node in found if node.get("GPU", 0) >= 1] if gpu else []
        cpus, gpus = threads, int(bool(with_gpu))
        for node in with_gpu:
            cpus = min(cpus, int(node.get("CPU", 0) // node["GPU"]) or 1)
        cpus = max(1, min(cpus, int(max((node.get("CPU", 0) for node in found), default=0))))
        each = [int(node.get("CPU", 0) // cpus) for node in with_gpu or found]
        if with_gpu:
            each = [min(n, int(node["GPU"])) for n, node in zip(each, with_gpu, strict=True)]
        return cls(cpus, gpus, sum(each), sum(slots > 0 for slots in each))


@contextmanager
def shards_on_cluster(
    cluster: ClusterConfig, job: ShardJob, *, force: bool = False, progress: Progress = SILENT
) -> Iterator[list[Path]]:
    """Have all shards done and give their files, which are removed if the block ends well.

    A run that breaks off leaves the files of the shards that are done.  The next one hands them to
    its workers, which check them and take them; ``force`` removes them first.

    Raises:
        ClusterError: Ray is not installed, the cluster cannot be used, or a shard was lost.
        ClipdeployError: what a shard raised.
    """
    threads = job.threads or _threads()
    with _connected(cluster.address) as (ray, own):
        plan = Plan.of(ray.nodes(), threads, gpu=job.gpu)
        if not plan.slots:
            raise ClusterError(
                "no node of the cluster has a CPU to give", hint="look at `ray status`"
            )
        shards = _shards(job, plan.slots)
        files = [job.file(shard) for shard in shards]
        if force:
            _remove(files)
        title = f"{job.title} in {len(shards)} shards, {plan.slots} at once on {_nodes(plan.nodes)}"
        with progress.task(title, len(shards)) as advance:

            def done(shard: Shard, content: bytes) -> None:
                write_atomic(job.file(shard), content)
                advance(1)

            _run(ray, own, job, plan, threads, shards, done)
    yield files
    _remove(files)


def _nodes(count: int) -> str:
    return "1 node" if count == 1 else f"{count} nodes"


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with file_errors("remove", file):
            file.unlink(missing_ok=True)


def _shards(job: ShardJob, slots: int) -> list[Shard]:
    """A few for each slot; as many as a run that broke off had, if that is enough."""
    count = min(job.most, slots * _SHARDS_PER_SLOT)
    left = [parts for parts in _left(job) if min(slots, job.most) <= parts <= job.most]
    if left:
        count = max(left, key=left.count)
    return [(i, count) for i in range(1, count + 1)]


def _left(job: ShardJob) -> list[int]:
    """The number of parts of every shard whose file lies there."""
    found = []
    for path in job.file((1, 1)).parent.iterdir():
        if match := re.search(r"\.(\d+)-of-(\d+)\.", path.name):
            shard = int(match[1]), int(match[2])
            if job.file(shard) == path:
                found.append(shard[1])
    return sorted(found)


def _ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        import ray
    except ImportError as error:
        raise ClusterError(
            "Ray is not installed", hint='pip install "clipdeploy[ray]", on every node'
        ) from error
    module: ModuleType = ray
    return module


@contextmanager
def _connected(address: str) -> Iterator[tuple[ModuleType, bool]]:
    """Ray, connected, and whether it was connected here: then that ends with the block."""
    ray = _ray()
    if ray.is_initialized():
        yield ray, False
        return
    if address not in (_LOCAL, _AUTO):
        _knock(address)
    # Ray prints on stdout that a worker died, which no option of its changes.
    with redirect_stdout(sys.stderr):
        try:
            _connect(ray, address)
            yield ray, True
        finally:
            ray.shutdown()


def _connect(ray: ModuleType, address: str) -> None:
    try:
        ray.init(
            address,
            include_dashboard=False if address == _LOCAL else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": _environment()},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster can be used at {address}: {first_line(error)}", hint=_START
        ) from error


def _environment() -> dict[str, str]:
    """What a worker needs of ours: it starts with its node's environment, in another folder."""
    ours = {k: v for k, v in os.environ.items() if k.startswith("CLIPDEPLOY_")}
    if paths := os.environ.get("PYTHONPATH"):
        ours["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    return ours


def _knock(address: str) -> None:
    """Find out in seconds what Ray itself finds out in minutes."""
    host, _, port = address.rpartition(":")
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        subprocess.run(check, capture_output=True, check=True, timeout=_HEALTH_SECONDS)
    except OSError as error:
        why = error.strerror or str(error)
        raise ClusterError(f"nothing answers at {address}: {why}", hint=_START) from error
    except subprocess.SubprocessError as error:
        raise ClusterError(f"what answers at {address} is no Ray cluster", hint=_START) from error


def _run(
    ray: ModuleType,
    own: bool,
    job: ShardJob,
    plan: Plan,
    threads: int,
    shards: Sequence[Shard],
    done: Callable[[Shard, bytes], None],
) -> None:
    task = ray.remote(_do_shard).options(
        name=job.title,
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        max_retries=_RETRIES,
        retry_exceptions=False,
        scheduling_strategy="SPREAD",
    )
    here = Path.cwd()
    pending = {task.remote(job, shard, threads, here): shard for shard in shards}
    try:
        while pending:
            ready, _ = ray.wait(list(pending), timeout=_LOOK_SECONDS)
            for reference in ready:
                shard = pending.pop(reference)
                done(shard, _content(ray, reference, shard))
            if not ready and not Plan.of(ray.nodes(), threads, gpu=job.gpu).slots:
                raise ClusterError(
                    f"no node is left that could do the other {len(pending)} shards",
                    hint="run the same command again on a whole cluster to go on",
                )
    except BaseException:
        # Our own disconnecting ends them.  Cancelling by force what has just ended makes Ray abort
        # this process.
        if not own:
            for reference in pending:
                ray.cancel(reference)
        raise


def _do_shard(job: ShardJob, shard: Shard, threads: int, folder: Path) -> bytes:
    """On the worker: the content of the shard's file.  Relative paths start at ``folder``."""
    for path in (folder, *(folder / path for path in job.reads)):
        if not path.exists():
            raise ClusterError(
                f"node {socket.gethostname()} does not see {path}",
                hint="workspace and images have to be on a file system that all nodes share, "
                "under the same path",
            )
    os.chdir(folder)
    with scratch_folder() as own:
        file = own / "shard"
        with suppress(FileNotFoundError):
            shutil.copy(job.file(shard), file)
        job.run(shard, threads, file)
        return file.read_bytes()


def _content(ray: ModuleType, reference: ObjectRef[bytes], shard: Shard) -> bytes:
    try:
        content: bytes = ray.get(reference)
        return content
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ClipdeployError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            "shard {}/{} was lost, and {} times again: ".format(*shard, _RETRIES)
            + first_line(error),
            hint="if memory ran out use fewer shards at once, with more --threads each",
        ) from error
