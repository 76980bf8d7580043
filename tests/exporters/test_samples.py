"""Normalised pixels, bit by bit, and the memory that they lie in.

Covers: clipdeploy/core/buffers.py.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clipdeploy.core.buffers import Buffers
from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, Preprocess, Recipe
from clipdeploy.models import cards
from exporters.preprocess_graph import scale_and_offset
from exporters.samples import Samples, normalise, stack_crops

CLIP = cards.find(cards.DEMO).preprocess(Recipe())
IMAGENET = replace(CLIP, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def crops(count: int, size: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def one_by_one(images: NDArray[np.uint8], spec: Preprocess) -> NDArray[np.float32]:
    """The definition: one float32 product and one float32 sum of each sample."""
    scale, offset = scale_and_offset(spec)
    table = np.arange(256, dtype=np.float32)[:, None] * scale + offset
    found = np.stack([table[images[..., channel], channel] for channel in range(3)], axis=1)
    return found.astype(np.float32)


@pytest.mark.parametrize("spec", [CLIP, IMAGENET], ids=["clip", "imagenet"])
@pytest.mark.parametrize(("count", "size"), [(1, 32), (700, 32), (9, 224), (3, 448), (0, 32)])
def test_normalised_pixels_have_the_bits_of_the_definition(
    count: int, size: int, spec: Preprocess
) -> None:
    images = crops(count, size)
    wanted = one_by_one(images, spec)
    for found in (normalise(images, spec), Samples(images, spec).pixels):
        assert found.shape == (count, 3, size, size)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert found.tobytes() == wanted.tobytes()
    if count:
        assert normalise(images[..., ::-1], spec).tobytes() != wanted.tobytes()


def test_pixels_that_anything_refers_to_are_not_written_to_again() -> None:
    """Through a view, a tensor or an array's copy of a slice: memory is used again after all."""
    kept, tensors, wanted = [], [], []
    for seed in range(12):
        pixels = Samples(crops(4, 32, seed), CLIP).pixels
        wanted.append(pixels.tobytes())
        if seed % 2:
            kept.append(pixels[:, 1:].reshape(4, -1)[::2])
        else:
            tensors.append(torch.from_numpy(pixels))
        del pixels
        gc.collect()
    for number, tensor in enumerate(tensors):
        assert tensor.numpy().tobytes() == wanted[2 * number]
    for number, view in enumerate(kept):
        whole = np.frombuffer(wanted[2 * number + 1], np.float32).reshape(4, 3, 32, 32)
        assert (view == whole[:, 1:].reshape(4, -1)[::2]).all()


def address(array: NDArray[np.float32]) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_nothing_refers_to_it() -> None:
    buffers = Buffers(keep=2)
    first = buffers.empty((4, 5), np.float32)
    place, view = address(first), first[1:]
    del first
    assert address(other := buffers.empty((4, 5), np.float32)) != place
    del view
    assert address(again := buffers.empty((2, 10), np.float32)) == place
    assert again.shape == (2, 10)
    assert again.flags.writeable
    assert address(other) != place


def test_only_so_many_blocks_wait_and_one_of_another_size_is_not_taken() -> None:
    buffers = Buffers(keep=2)
    arrays = [buffers.empty((64, 64), np.float32) for _ in range(5)]
    places = {address(array) for array in arrays}
    assert len(places) == 5
    del arrays
    assert len(buffers._free) == 2
    smaller = buffers.empty((3, 3), np.uint8)
    assert (smaller.dtype, smaller.size, len(buffers._free)) == (np.uint8, 9, 2)
    again = [buffers.empty((64, 64), np.float32) for _ in range(2)]
    assert {address(array) for array in again} < places
    assert len(buffers._free) == 0


def test_crops_that_lie_behind_each_other_are_stacked_without_a_copy() -> None:
    memory = Buffers(keep=1).empty((6, 32, 32, 3), np.uint8)
    memory[:] = crops(6, 32)
    parts = list(memory)
    for chosen, copied in (
        (parts, False),
        (parts[2:5], False),
        (parts[:1], False),
        ([parts[1], parts[0]], True),
        (parts[::2], True),
        ([parts[0], parts[1].copy()], True),
        ([part.transpose(1, 0, 2) for part in parts[:2]], True),
        ([part.copy() for part in parts], True),
    ):
        found = stack_crops(chosen)
        assert np.array_equal(found, np.stack(chosen))
        assert found.flags.c_contiguous
        assert np.shares_memory(found, memory) != copied
