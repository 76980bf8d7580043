"""Copies, streams, profiles, events and CUDA graphs of an engine's runner.

TensorRT is a stand-in; ``torch.cuda`` is real on a GPU, and a stand-in elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import cuda_stand_in
from doubling_engine import PROFILES, doubling_runner, expected, images

from clipdeploy.benchmark.rounds import Case, measure

# Both profiles, their limits, batches that are split or padded, and batches that come again.
BATCHES = (1, 3, 4, 5, 17, 32, 70, 3, 32, 1)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "stand-in"])
def cuda(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the runner runs."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("PyTorch is built without CUDA")
        yield request.param
    else:
        with cuda_stand_in():
            yield request.param


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["launched", "recorded"])
def test_every_batch_has_its_own_logits(cuda: str, cuda_graph: bool) -> None:
    with doubling_runner(cuda_graph=cuda_graph) as runner:
        for batch in BATCHES:
            given = images(batch)
            np.testing.assert_array_equal(runner(given), expected(given))
        # A context for each profile, or for each batch that was recorded.
        launchers = runner._loaded._launchers
        assert len(launchers) == (len({1, 3, 4, 5, 6, 17, 32}) if cuda_graph else len(PROFILES))


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["launched", "recorded"])
def test_a_chosen_profile_runs(cuda: str, cuda_graph: bool) -> None:
    given = images(7)
    with doubling_runner(cuda_graph=cuda_graph) as runner:
        for profile in range(len(PROFILES)):
            np.testing.assert_array_equal(runner.run_in(profile, given), expected(given))


def test_a_measured_launch_does_not_change_the_logits(cuda: str) -> None:
    first, other = images(3), images(4)
    with doubling_runner(cuda_graph=True) as runner:
        case = Case("x", "x", runner, first)  # type: ignore[arg-type]
        case.warm_up(0.0, iter(range(9)).__next__)
        measure([case], seconds=None, rounds=5)
        assert case.device is not None
        assert len(case.device) == 5
        # The launch is inside of the call; the call also copies.
        assert all(inside > 0 for inside in case.device)
        np.testing.assert_array_equal(runner(other), expected(other))


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["launched", "recorded"])
def test_a_runner_that_does_not_wait_is_found(
    cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is as late as a GPU: without waiting, the last batch's logits are there."""
    with cuda_stand_in(), doubling_runner(cuda_graph=cuda_graph) as runner:
        given = images(3)
        runner(given)
        with monkeypatch.context() as patch:
            patch.setattr(runner._loaded._stream, "synchronize", lambda: None)
            stale = runner(given + 1)
        np.testing.assert_array_equal(stale, expected(given))


@pytest.mark.gpu
def test_memory_is_freed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is built without CUDA")
    before = torch.cuda.memory_allocated()
    with doubling_runner(cuda_graph=True) as runner:
        runner(images(32))
        held: Any = torch.cuda.memory_allocated()
    assert held > before
    del runner
    assert torch.cuda.memory_allocated() == before
