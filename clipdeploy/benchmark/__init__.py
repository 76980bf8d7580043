"""How fast artifacts are, side by side.

A round runs every artifact at every batch once, in a new shuffled order: what else the machine does
falls on all of them alike, and the ratio of two latencies of one round is fair.  A latency is from
the input in host memory to the logits in host memory: copies are in it, decoding of images is not.
Where a GPU runs the artifact, a second launch in the same round is timed by the GPU itself.
"""

from clipdeploy.benchmark.lineup import NotRun
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig, BenchmarkRow
from clipdeploy.benchmark.run import benchmark_artifacts, benchmark_model

__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "BenchmarkRow",
    "NotRun",
    "benchmark_artifacts",
    "benchmark_model",
]
