"""Which batches reach an engine; the engine is a stand-in, because it needs a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy.core.passport import TensorSpec
from clipdeploy.runners.base import best_profile
from clipdeploy.runners.engine import EngineRunner


class Doubling:
    """The interface of an engine with two profiles; its logits are twice the images."""

    name, input = "TensorRT stand-in", TensorSpec("image", "float32", ("batch", 1))
    batches, profiles = (1, 32), ((1, 2, 4), (8, 16, 32))

    def __init__(self, path: Path, *, trust: bool, cuda_graph: bool) -> None:
        self.ran: list[tuple[int, int]] = []

    def run(self, images: NDArray[np.float32], profile: int | None = None) -> NDArray[np.float32]:
        chosen = best_profile(self.profiles, len(images)) if profile is None else profile
        low, _, high = self.profiles[chosen]
        assert low <= len(images) <= high
        self.ran.append((chosen, len(images)))
        return images * 2

    def close(self) -> None:
        """Release nothing."""


@pytest.mark.parametrize("count", range(1, 41))
def test_any_number_of_images_runs_in_sizes_that_a_profile_accepts(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipdeploy.runners.engine.Engine", Doubling)
    images = np.arange(count, dtype=np.float32)[:, None]
    with EngineRunner(Path("a.engine")) as runner:
        assert runner(images).tolist() == (images * 2).tolist()
        for profile in (0, 1):
            assert runner.run_in(profile, images).tolist() == (images * 2).tolist()
