"""Runs shards as tasks of a Ray cluster, or of Ray on this machine.

    this process                          a worker
    the shards        -- Ray tasks -->    processes one shard in a temporary folder
    the shard's file  <-- its bytes --    returns the file's content

Ray repeats a shard if its process or node dies.  Workers write no shared files, so that an attempt
that Ray wrongly gave up cannot damage the result of the attempt that replaced it.
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
# Repetitions of a shard whose process died; after a fourth death the shard itself is the cause.
_RETRIES = 3
_ANSWER_SECONDS = 5.0
# Two seconds for the answer, the rest to start Python on a busy machine.
_HEALTH_SECONDS = 60.0
_LOOK_SECONDS = 5.0
_START = "start one with `ray start --head`, which prints its address, or use --ray local"


@dataclass(frozen=True)
class ClusterConfig:
    """``address``: HOST:PORT of a Ray cluster, ``auto`` or ``local``.

    ``auto`` is the cluster of this machine; ``local`` starts one here and stops it afterwards.

    Raises:
        UsageError: ``address`` is none of these.
    """

    address: str = _LOCAL

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        # Python does not parse numbers of more than a few thousand digits.
        digits = port.isdecimal() and len(port) < 6
        named = bool(host) and colon == ":" and digits and int(port) < 1 << 16
        if self.address not in (_LOCAL, _AUTO) and ("/" in host or not named):
            raise UsageError(
                f"{self.address[:60]!r} is not the address of a Ray cluster",
                hint="--ray HOST:6379 on a machine of the cluster, --ray auto, or --ray local",
            )


@dataclass(frozen=True)
class ShardJob:
    """Work that can be divided into at most ``most`` shards.

    ``run`` takes a shard (i, n), a number of threads and a path, and writes the shard's file there;
    an unfinished file of an earlier run may exist at that path.  ``file`` gives the final path of a
    shard's file.  Both are pickled.  ``reads`` are the paths that ``run`` needs.  With ``gpu``, a
    shard uses a GPU if there is one.  With ``threads`` 0, PyTorch's number of threads here is used.
    """

    title: str
    run: Callable[[Shard, int, Path], object]
    file: Callable[[Shard], Path]
    most: int
    reads: tuple[Path, ...]
    threads: int = 0
    gpu: bool = False


@dataclass(frozen=True)
class Allocation:
    """The CPUs and GPUs of a shard, and how many shards run at once on how many nodes."""

    cpus: int
    gpus: int
    slots: int
    nodes: int

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], threads: int, *, gpu: bool) -> Allocation:
        """The allocation for ``nodes``, as listed by ``ray.nodes()``.

        A shard takes a CPU for each thread, or all CPUs of the largest node if that has fewer; with
        ``gpu``, also a GPU if any node has one.  Nodes that are too small run no shards.
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
    """Process all shards and yield their files, which are removed if the block succeeds.

    An interrupted run leaves the files of finished shards, which the next run checks and reuses;
    ``force`` removes them first.

    Raises:
        ClusterError: Ray is not installed, the cluster cannot be used, or a shard was lost.
        ClipdeployError: a shard raised it.
    """
    threads = job.threads or _threads()
    with _connected(cluster.address) as (ray, own):
        allocation = Allocation.of(ray.nodes(), threads, gpu=job.gpu)
        if not allocation.slots:
            raise ClusterError("no node of the cluster has a free CPU", hint="check `ray status`")
        shards = _shards(job, allocation.slots)
        files = [job.file(shard) for shard in shards]
        if force:
            _remove(files)
        title = f"{job.title} in {len(shards)} shards, {allocation.slots} at once on "
        title += _nodes(allocation.nodes)
        with progress.task(title, len(shards)) as advance:

            def done(shard: Shard, content: bytes) -> None:
                write_atomic(job.file(shard), content)
                advance(1)

            _run(ray, own, job, allocation, threads, shards, done)
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
    """A few shards for each slot, or as many as an interrupted run had, if those are enough."""
    count = min(job.most, slots * _SHARDS_PER_SLOT)
    left = [parts for parts in _left(job) if min(slots, job.most) <= parts <= job.most]
    if left:
        count = max(left, key=left.count)
    return [(i, count) for i in range(1, count + 1)]


def _left(job: ShardJob) -> list[int]:
    """The number of parts of each existing shard file."""
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
    """Connect to Ray; yields its module, and whether this call connected and will disconnect."""
    ray = _ray()
    if ray.is_initialized():
        yield ray, False
        return
    if address not in (_LOCAL, _AUTO):
        _knock(address)
    # Ray prints on stdout that a worker died, and has no option against that.
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
            f"cannot use a Ray cluster at {address}: {first_line(error)}", hint=_START
        ) from error


def _environment() -> dict[str, str]:
    """Variables to pass to workers, which have their node's environment and another folder."""
    ours = {k: v for k, v in os.environ.items() if k.startswith("CLIPDEPLOY_")}
    if paths := os.environ.get("PYTHONPATH"):
        ours["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    return ours


def _knock(address: str) -> None:
    """Check in seconds that there is a cluster; Ray itself takes minutes to give up."""
    host, _, port = address.rpartition(":")
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_SECONDS).close()
        subprocess.run(check, capture_output=True, check=True, timeout=_HEALTH_SECONDS)
    except OSError as error:
        why = error.strerror or str(error)
        raise ClusterError(f"no answer from {address}: {why}", hint=_START) from error
    except subprocess.SubprocessError as error:
        raise ClusterError(f"{address} is not a Ray cluster", hint=_START) from error


def _run(
    ray: ModuleType,
    own: bool,
    job: ShardJob,
    allocation: Allocation,
    threads: int,
    shards: Sequence[Shard],
    done: Callable[[Shard, bytes], None],
) -> None:
    task = ray.remote(_do_shard).options(
        name=job.title,
        num_cpus=allocation.cpus,
        num_gpus=allocation.gpus,
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
            if not ready and not Allocation.of(ray.nodes(), threads, gpu=job.gpu).slots:
                raise ClusterError(
                    f"no node is left for the remaining {len(pending)} shards",
                    hint="restart the nodes, then run the same command again to continue",
                )
    except BaseException:
        # Disconnecting ends our own tasks.  Ray aborts this process if a task is cancelled by force
        # just after its end.
        if not own:
            for reference in pending:
                ray.cancel(reference)
        raise


def _do_shard(job: ShardJob, shard: Shard, threads: int, folder: Path) -> bytes:
    """Process a shard on a worker and return the content of its file.

    Relative paths start at ``folder``.
    """
    for path in (folder, *(folder / path for path in job.reads)):
        if not path.exists():
            raise ClusterError(
                f"node {socket.gethostname()} cannot access {path}",
                hint="workspace and images must be on a file system that all nodes share, "
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
            "shard {}/{} was lost in {} attempts: ".format(*shard, _RETRIES + 1)
            + first_line(error),
            hint="if memory ran out, use fewer shards at once: give each more --threads",
        ) from error
