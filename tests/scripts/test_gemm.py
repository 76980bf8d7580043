"""The measurement of products on a GPU: its passes, its estimate, and a rehearsal without one."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from cuda_stand_in import cuda_stand_in
from script_module import load_script

from clipdeploy.engines.gpus import find_gpu


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("bench/gemm")


def test_both_ways_compute_the_same(script: ModuleType) -> None:
    works = script.works(64, 96, 48, "cpu", lambda function: function)
    plain, quantised = works["fp16_pass"]().float(), works["int8_pass"]().float() / 20
    # GELU is at most 4 here; INT8 rounds it to 1/40, and the operands to a few hundredths.
    assert (plain - quantised).abs().max() < 0.15
    sums = works["int8"]()
    assert sums.dtype == torch.int32
    # Twin: with a scale that is not that of the operands.
    wrong = script.int8_pass(sums, torch.tensor(1e-3), torch.zeros(48)).float() / 20
    assert (plain - wrong).abs().max() > 1


def test_int8_gains_least_where_the_pass_moves_most(script: ModuleType) -> None:
    gpu = find_gpu("H100-SXM")
    gains = {name: script.estimate(32 * 197, *shape, gpu) for name, shape in script.SHAPES.items()}
    # fc2 has the most operations for each output.
    assert max(gains, key=lambda name: gains[name]) == "fc2"
    assert all(1 <= gain < 2 for gain in gains.values())


def test_a_rehearsal_on_the_cpu(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    works = script.works
    sizes: dict[str, object] = {"CACHE_BYTES": 1 << 10, "COPY_BYTES": 1 << 20}
    for name, value in sizes.items():
        monkeypatch.setattr(script, name, value)

    def on_cpu(rows: int, k: int, n: int, device: str, fuse: object) -> object:
        return works(rows // 50, k // 24, n // 24, "cpu", fuse)

    monkeypatch.setattr(script, "works", on_cpu)
    monkeypatch.setattr(script, "fuser", lambda: (lambda function: function, "+eager"))
    monkeypatch.setattr(script, "local_gpu", lambda: find_gpu("H100-SXM"))
    with cuda_stand_in():
        for words in ([], ["--json"]):
            monkeypatch.setattr("sys.argv", ["gemm.py", "--batch", "2", *words])
            script.main()
    *table, line = capsys.readouterr().out.splitlines()
    assert table[0].startswith("stand-in: a copy moves ")
    assert [row.split()[0] for row in table[2:]] == [*script.SHAPES] * 2
    found = json.loads(line)
    assert not found["fused"]
    assert {row["rows"] for row in found["rows"]} == {2 * tokens for tokens in script.TOKENS}
    assert all(row["int8"] > 0 < row["int8_of_peak"] for row in found["rows"])


def test_a_machine_without_a_gpu(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gemm.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees no GPU"):
        script.main()
