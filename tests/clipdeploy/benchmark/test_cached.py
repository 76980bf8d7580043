"""Tests when a saved benchmark is reused and when it is measured again."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from graph_faults import ruin, turn_answers

from clipdeploy.benchmark import BenchmarkConfig
from clipdeploy.benchmark.cached import cached_benchmark
from clipdeploy.benchmark.environment import read_environment
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


def test_a_benchmark_is_reused_only_for_the_same_files_settings_and_machine(
    demo_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = tmp_path / "a.onnx"
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), graph)
    cache = tmp_path / "benchmark.json"
    short = BenchmarkConfig(batches=(1,), seconds=None, rounds=1, warmup=0)

    def measured(config: BenchmarkConfig = short) -> bool:
        return cached_benchmark([graph], cache, config).changed

    assert measured()
    assert not measured()
    assert measured(replace(short, rounds=2))
    assert measured()
    cache.write_bytes(cache.read_bytes()[:-100])
    assert measured()
    turn = replace(read_environment(None, None, on_gpu=False, load=None), gpu="another one")
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr("clipdeploy.benchmark.cached.read_environment", lambda *a, **b: turn)
        assert measured()
    ruin(graph, turn_answers)
    assert measured()
