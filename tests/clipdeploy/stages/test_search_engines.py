"""Engines with chosen products in 8 bits: built by TensorRT-RTX without a GPU, timed on one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from calibration.formats import FormatName
from calibration.scheme import SchemeConfig
from clipdeploy.benchmark.estimate import estimate_artifacts
from clipdeploy.core.device import gpus
from clipdeploy.core.errors import EngineError
from clipdeploy.engines.backends import Backend
from clipdeploy.engines.build_config import BuildConfig
from clipdeploy.engines.gpus import find_gpu
from clipdeploy.engines.passport import EnginePassport, read_engine_passport
from clipdeploy.engines.roofline import (
    Formats,
    Geometry,
    block_products,
    engine_seconds,
    kernels,
)
from clipdeploy.models import cards
from clipdeploy.stages.search_engines import EngineTimer
from clipdeploy.tuning.engine_costs import timed_costs, timed_variants
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

BATCH = 8
GEOMETRY = Geometry.of_card(cards.find(cards.DEMO))


def demo_timer(
    workspace: Workspace, folder: Path, *capability: str, backend: Backend = "tensorrt-rtx"
) -> EngineTimer:
    source, _ = workspace.source(cards.DEMO)
    return EngineTimer(
        source,
        workspace.calibration(cards.DEMO),
        tuple(n for block in range(GEOMETRY.depth) for n in block_products(GEOMETRY, block)),
        SchemeConfig(),
        BuildConfig(
            backend,
            profiles=((BATCH, BATCH, BATCH),),
            compute_capability=capability,
        ),
        folder,
    )


@pytest.fixture
def timer(tensorrt_rtx: None, demo_workspace: Workspace, tmp_path: Path) -> EngineTimer:
    return demo_timer(demo_workspace, tmp_path, "8.9")


def mixed(variants: Sequence[Formats]) -> Formats:
    """Each inner block as in another one of ``variants``, the others in FP16."""
    return {
        name: form
        for block, formats in enumerate(variants, start=1)
        for name, form in formats.items()
        if name.startswith(f"blocks.{block}.")
    }


def check_engine(timer: EngineTimer, formats: Formats, folder: Path) -> EnginePassport:
    """Build an engine, and compare graph and kernels with what the roofline expects of them."""
    folder.mkdir()
    passport = read_engine_passport(timer.engine(formats, folder))
    assert passport.profiles == ((BATCH, BATCH, BATCH),)
    expected = kernels(GEOMETRY, formats, BATCH)
    # The estimate reads the formats off the graph, those of the sums included.
    (row,) = estimate_artifacts(folder / "timed.onnx", "L4", (BATCH,)).rows
    seconds = engine_seconds(expected, find_gpu("L4"))
    assert row.milliseconds == pytest.approx(1e3 * seconds, rel=1e-12)
    # TensorRT-RTX merges or splits kernels of the first and the last block.
    for block in ("blocks.1", "blocks.2", "blocks.3", "blocks.4"):
        kinds = {name for name in formats if name.startswith(f"{block}.")}
        assert passport.kernels[block] == sum(each.block == block for each in expected), kinds
    return passport


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_the_kernels_of_the_timed_engines(
    form: FormatName, timer: EngineTimer, tmp_path: Path
) -> None:
    last = f"blocks.{GEOMETRY.depth - 1}."
    # The engines that differ in the last block only have the same kernels in those compared.
    variants = [
        formats
        for formats in timed_variants(GEOMETRY, form)
        if not formats or not all(name.startswith(last) for name in formats)
    ]
    assert len(variants) == 11
    *others, whole = variants
    # A block's kernels follow from its own formats: each block shows another engine's.  Those with
    # 8-bit sums have them in each qkv and fc1.
    sums = [formats for formats in others if any(name.endswith(".output") for name in formats)]
    plain = [formats for formats in others if formats not in sums]
    assert (len(plain), len(sums)) == (8, 2)
    for number, four in enumerate((plain[:4], plain[4:], [*sums, *sums])):
        check_engine(timer, mixed(four), tmp_path / f"{number}")
    check_engine(timer, whole, tmp_path / "whole")
    settings = read_passport(tmp_path / "whole" / "timed.onnx").settings
    assert settings["scope"]["outputs"] is True
    # Attention has two products a block.
    assert settings[f"{form}_nodes"] == 24 + 2 * 5


# Another choice in each inner block.
MIXED = {
    1: ("mlp.fc2",),
    2: ("attn.qkv", "attn", "attn.proj", "mlp.fc2"),
    3: ("attn", "mlp.fc1"),
    4: ("attn.proj", "mlp.fc1", "mlp.fc2"),
}


def test_the_kernels_of_a_choice_that_differs_from_block_to_block(
    timer: EngineTimer, tmp_path: Path
) -> None:
    counts = {}
    for form, inner in (("int8", [9, 9, 15, 10]), ("fp8", [8, 8, 9, 9])):
        chosen = [f"blocks.{block}.{kind}" for block, kinds in MIXED.items() for kind in kinds]
        formats: Formats = dict.fromkeys(chosen, form)  # type: ignore[arg-type]
        folder = tmp_path / form
        folder.mkdir()
        found = read_engine_passport(timer.engine(formats, folder)).kernels
        counts[form] = [found[f"blocks.{block}"] for block in MIXED]
        names = [each.block for each in kernels(GEOMETRY, formats, BATCH)]
        assert counts[form] == [names.count(f"blocks.{block}") for block in MIXED]
        assert counts[form] == inner
    # Those of the other format would be noticed.
    assert counts["int8"] != counts["fp8"]


def test_formats_of_no_graph_are_refused(timer: EngineTimer, tmp_path: Path) -> None:
    some: Formats = dict.fromkeys(
        ("blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.attn.qkv.output"), "int8"
    )
    mixed: Formats = {"blocks.0.attn.qkv": "int8", "blocks.1.attn.qkv": "fp8"}
    unknown: Formats = {"blocks.9.attn.qkv": "int8"}
    for formats in (some, mixed, unknown):
        with pytest.raises(ValueError, match="no graph has exactly these formats"):
            timer.engine(formats, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(gpus()), reason="tests a machine without a GPU")
def test_without_a_gpu_the_built_engine_is_not_timed(timer: EngineTimer, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"an engine cannot be timed here \(no GPU on this mach"):
        timer({})
    assert (tmp_path / "fp16" / "timed.engine").exists()
    with pytest.raises(EngineError, match="no GPU on this machine"):
        timer({"blocks.0.attn.qkv": "int8"})
    # Nothing but the engine of FP16 stays.
    assert [path.name for path in tmp_path.iterdir()] == ["fp16"]


@pytest.mark.gpu
def test_engines_are_timed(gpu_backend: Backend, demo_workspace: Workspace, tmp_path: Path) -> None:
    here = [gpus()[0].capability] if gpu_backend == "tensorrt-rtx" else []
    timer = demo_timer(demo_workspace, tmp_path, *here, backend=gpu_backend)
    first, again = timer({})
    assert first == again
    half, own = timer(timed_variants(GEOMETRY, "int8")[-1])
    # In microseconds: the demo takes a few dozen kernels, each at least as long as a launch.
    for time in (first, half, own):
        assert 10 < time < 1e5
    assert timed_costs(GEOMETRY, lambda formats: timer(formats)[1], BATCH, "int8", "here").none > 0
