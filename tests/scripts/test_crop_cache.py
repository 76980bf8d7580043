"""The caches of the benchmark return what was written, and a wrong crop ends it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from script_module import load_script

script = load_script("bench/crop_cache")
CROPS = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
KEYS = [hashlib.sha256(crop.tobytes()).hexdigest() for crop in CROPS]


def test_the_shards_return_what_was_written(tmp_path: Path) -> None:
    cache = script.Shards(tmp_path, CROPS.shape[1:])
    cache.write(KEYS, CROPS)
    assert cache.read(KEYS) == int(CROPS[0, 0, 0, 0]) + int(CROPS[32, 0, 0, 0])


def test_a_missing_crop_ends_the_benchmark(tmp_path: Path) -> None:
    cache = script.Shards(tmp_path, CROPS.shape[1:])
    cache.write(KEYS[:39], CROPS[:39])
    with pytest.raises(AssertionError):
        cache.read(KEYS)
