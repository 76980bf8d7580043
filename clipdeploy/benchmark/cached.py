"""A benchmark that is not measured twice: of the same files, with the same settings, here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.benchmark.environment import read_environment
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig
from clipdeploy.benchmark.run import benchmark_artifacts
from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.files import sha256_file, write_atomic
from clipdeploy.core.passport import read_json, to_json
from clipdeploy.core.progress import SILENT, Progress

__all__ = ["KeptBenchmark", "keep_benchmark"]

# What a machine is known by: its load and its clocks are other ones at any moment.
_MACHINE = ("platform", "cpu", "cpus", "gpu", "sm", "driver", "cuda", "versions")


@dataclass(frozen=True)
class KeptBenchmark:
    """A benchmark and the SHA-256 of the files it measured; ``changed`` if it was measured now."""

    files: dict[str, str]
    benchmark: Benchmark
    changed: bool = True


def keep_benchmark(
    paths: Sequence[Path],
    keep: Path,
    config: BenchmarkConfig = BenchmarkConfig(),
    *,
    force: bool = False,
    progress: Progress = SILENT,
    note: Callable[[str], object] = lambda text: None,
) -> KeptBenchmark:
    """Measure graphs and engines, unless ``keep`` holds just that; see ``benchmark_artifacts``.

    A measurement in which nothing ran is not believed a second time.

    Raises:
        UsageError, FileError: see :func:`clipdeploy.benchmark.benchmark_artifacts`.
    """
    files = {str(path): sha256_file(path) for path in paths}
    found = None if force else _read(keep)
    if found and found.files == files and _holds(found.benchmark, config):
        return KeptBenchmark(files, found.benchmark, changed=False)
    made = KeptBenchmark(files, benchmark_artifacts(paths, config, progress=progress, note=note))
    write_atomic(keep, to_json(made))
    return made


def _read(path: Path) -> KeptBenchmark | None:
    if not path.exists():
        return None
    try:
        return read_json(path, KeptBenchmark)
    except ArtifactError:
        return None


def _holds(benchmark: Benchmark, config: BenchmarkConfig) -> bool:
    here = read_environment(None, None, on_gpu=False, load=None)
    there = benchmark.environment
    same = all(getattr(here, name) == getattr(there, name) for name in _MACHINE)
    return bool(benchmark) and benchmark.config == config and same
