"""Measures and compares the latency and throughput of artifacts.

Each round runs every artifact at every batch once, in a new random order.  Other load on the
machine then affects all of them equally, and the ratio of two latencies of one round is fair.  A
latency extends from the input in host memory to the logits in host memory: it includes copies, but
not the decoding of images.  On a GPU, CUDA events time a second launch in each round.
"""

from clipdeploy.benchmark.estimate import (
    EstimateRow,
    GpuTable,
    SpeedEstimate,
    estimate_artifacts,
    estimate_model,
    known_gpus,
)
from clipdeploy.benchmark.lineup import NotRun
from clipdeploy.benchmark.result import Benchmark, BenchmarkConfig, BenchmarkRow
from clipdeploy.benchmark.run import benchmark_artifacts, benchmark_model

__all__ = [
    "Benchmark",
    "BenchmarkConfig",
    "BenchmarkRow",
    "EstimateRow",
    "GpuTable",
    "NotRun",
    "SpeedEstimate",
    "benchmark_artifacts",
    "benchmark_model",
    "estimate_artifacts",
    "estimate_model",
    "known_gpus",
]
