"""Reuses a saved benchmark of the same files and settings on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.benchmark.environment import read_environment
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig
from clipdeploy.benchmark.run import benchmark_artifacts
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import read_json, to_json
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.verification.targets import digest_of_artifact

__all__ = ["CachedBenchmark", "cached_benchmark"]

# The fields that identify a machine; its load and clocks change all the time.
_MACHINE = ("platform", "cpu", "cpus", "gpu", "sm", "driver", "cuda", "versions")


@dataclass(frozen=True)
class CachedBenchmark:
    """A benchmark and the SHA-256 of its files; ``changed`` is False if it was reused."""

    files: dict[str, str]
    benchmark: Benchmark
    changed: bool = True


def cached_benchmark(
    paths: Sequence[Path],
    cache: Path,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
    note: Callable[[str], object] = lambda text: None,
) -> CachedBenchmark:
    """Measure graphs and engines, or return the saved result if nothing has changed.

    The result is saved in the file ``cache``.  A result in which nothing ran is measured again.

    Raises:
        UsageError, FileError: see :func:`clipdeploy.benchmark.benchmark_artifacts`.
    """
    files = {str(path): digest_of_artifact(path) for path in paths}
    found = None if force else _read(cache)
    if found and found.files == files and _matches(found.benchmark, config):
        return CachedBenchmark(files, found.benchmark, changed=False)
    made = CachedBenchmark(files, benchmark_artifacts(paths, config, progress=progress, note=note))
    write_atomic(cache, to_json(made))
    return made


def _read(path: Path) -> CachedBenchmark | None:
    if not path.exists():
        return None
    try:
        return read_json(path, CachedBenchmark)
    except ArtifactError:
        return None


def _matches(benchmark: Benchmark, config: BenchmarkConfig) -> bool:
    current = read_environment(None, None, on_gpu=False, load=None)
    saved = benchmark.environment
    same = all(getattr(current, name) == getattr(saved, name) for name in _MACHINE)
    return bool(benchmark) and benchmark.config == config and same
