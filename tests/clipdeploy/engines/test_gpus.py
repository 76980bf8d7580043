"""The table of GPUs, and what is refused in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from clipdeploy.core.data_rows import read_rows
from clipdeploy.core.device import Gpu
from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.engines import gpus
from clipdeploy.engines.gpus import DEFAULT_GPU, all_gpus, find_gpu, local_gpu


def test_rates_are_dense_and_in_the_proportions_of_tensor_cores() -> None:
    for gpu in all_gpus():
        assert gpu.source.startswith("NVIDIA ")
        # 8-bit products run at twice the FP16 rate, at four times where FP32 sums halve the latter.
        if gpu.name != "B300":
            slow_sums = gpu.name in ("RTX-4090", "RTX-5090")
            assert gpu.int8_tops / gpu.fp16_tflops == pytest.approx(4 if slow_sums else 2, rel=0.04)
        if gpu.fp8_tflops is not None:
            assert gpu.fp8_tflops / gpu.fp16_tflops == pytest.approx(2, rel=0.02)
        # FP8 came with compute capability 8.9.
        version = tuple(map(int, gpu.compute_capability.split(".")))
        assert (gpu.fp8_tflops is not None) == (version >= (8, 9))
    assert find_gpu("B300").rate("int8") == 0.15e12 * 1000
    assert find_gpu("T4").rate("fp8") is None


def test_names_are_unique_and_spelling_does_not_matter() -> None:
    names = [gpus._plain(n) for gpu in all_gpus() for n in {gpu.name, *gpu.driver_names}]
    plain = {gpus._plain(gpu.name) for gpu in all_gpus()}
    assert len(plain) == len(all_gpus())
    assert len(set(names)) == len(gpus._by_name())
    for typed in ("rtx 4090", "RTX-4090", "NVIDIA GeForce RTX 4090", "rtx_4090"):
        assert find_gpu(typed).name == "RTX-4090"
    assert find_gpu("NVIDIA A100-SXM4-80GB").bandwidth == 2039e9
    assert find_gpu(DEFAULT_GPU).name == DEFAULT_GPU


@pytest.mark.parametrize(
    ("typed", "nearest"), [("H100", "H100-SXM, H100-PCIe"), ("RTX 4080", "RTX-4090"), ("x", "")]
)
def test_an_unknown_gpu_is_refused_with_the_known_ones(typed: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"no data sheet of a GPU {typed!r}") as caught:
        find_gpu(typed)
    assert ("near it: " in caught.value.message) == bool(nearest)
    assert nearest in caught.value.message
    assert all(gpu.name in caught.value.hint for gpu in all_gpus())


@pytest.mark.parametrize(
    ("name", "found"), [("NVIDIA L4", "L4"), ("Tesla T4", "T4"), ("NVIDIA TITAN V", None)]
)
def test_the_local_gpu(name: str, found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "gpus", lambda: (Gpu(name, (8, 9)),))
    local = local_gpu()
    assert (local and local.name) == found
    monkeypatch.setattr(gpus, "gpus", tuple)
    assert local_gpu() is None


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces fields of the first row of ``gpus.csv``."""
    first, *others = read_rows("gpus.csv", hint="h")

    def change(**fields: str | None) -> None:
        edited = [replace(first, columns=first.columns | fields), *others]
        monkeypatch.setattr(gpus, "read_rows", lambda name, hint: edited)
        all_gpus.cache_clear()

    yield change
    monkeypatch.undo()
    all_gpus.cache_clear()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("name", ""),
        ("source", None),
        ("compute_capability", "75"),
        ("bandwidth_gb_s", "0"),
        ("bandwidth_gb_s", "inf"),
        ("fp16_tflops", ""),
        ("fp16_tflops", "fast"),
        ("accumulate", "int32"),
        ("int8_tops", "nan"),
        ("fp8_tflops", "-1"),
    ],
)
def test_a_bad_field_is_named(column: str, value: str | None, table: Callable[..., None]) -> None:
    table(**{column: value})
    with pytest.raises(ArtifactError, match=f"gpus.csv, line 2: no valid value in column {column}"):
        all_gpus()


def test_a_row_more_is_a_gpu_more(table: Callable[..., None]) -> None:
    table(name="X1", driver_names="NVIDIA X1|NVIDIA X1 PCIe", fp8_tflops="7")
    assert find_gpu("nvidia x1 pcie").fp8_tflops == 7
