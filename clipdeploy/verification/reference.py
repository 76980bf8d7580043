"""The reference's logits: computed by PyTorch, or kept from an earlier run on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from clipdeploy.core.passport import Preprocess, settings_of
from clipdeploy.engines.passport import library_versions
from clipdeploy.imaging import CropCache
from clipdeploy.imaging.crop_shards import NO_STAMP
from clipdeploy.imaging.crops import Shelf
from clipdeploy.imaging.keys import digest_of, pixels_key, sources
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners.torch import TorchRunner
from exporters.samples import Samples

__all__ = ["Reference"]

_FORMAT = 3
# Our own code from a crop and a checkpoint to logits.
_DECIDES_LOGITS = (
    "clipdeploy.models.checkpoints",
    "clipdeploy.models.load",
    "clipdeploy.runners.torch",
    "clipdeploy.models.vit",
    "exporters.preprocess_graph",
    "exporters.samples",
)


class Reference:
    """PyTorch's logits of a batch; with a ``cache`` each batch is computed once.

    Logits are found by what decides them to the last bit: everything that decides pixels (see
    :func:`clipdeploy.imaging.keys.pixels_key`), mean and std, weights, recipe, the code that makes
    logits of crops, device, threads, PyTorch's version, and the files and crops of the batch.
    ``cache_problem`` says in a sentence why no further logits are kept; empty if they are.
    """

    def __init__(
        self, model: LoadedModel, spec: Preprocess, cache: CropCache | None, threads: int = 0
    ) -> None:
        self._runner = TorchRunner(model.module, spec, threads)
        self._shelf: Shelf[np.float32] | None = None
        self.name = self._runner.name
        if cache is not None and model.weights.identity:
            classes = model.module.config.classes
            self._shelf = Shelf(cache, self._shelf_name(model, spec), (classes,), np.float32)

    def _shelf_name(self, model: LoadedModel, spec: Preprocess) -> str:
        decides = {
            "format": _FORMAT,
            "pixels": pixels_key(spec),
            "weights": model.weights.identity,
            "recipe": settings_of(model.recipe),
            "preprocess": settings_of(spec),
            "config": settings_of(model.module.config),
            "code": sources(_DECIDES_LOGITS),
            "runner": self.name,
            "threads": self._runner.threads,
            "torch": library_versions().get("torch"),
            # Which of PyTorch's kernels a processor gets decides the last bits.
            "processor": torch.backends.cpu.get_cpu_capability(),
        }
        return f"logits-{digest_of(decides)}"

    @property
    def cache_problem(self) -> str:
        """Why no further logits are kept, as a sentence; empty if they are."""
        return self._shelf.problem if self._shelf is not None else ""

    def __call__(self, hashes: Sequence[str], samples: Samples) -> NDArray[np.float32]:
        """Logits (B, K) of B images: the hex SHA-256 of their files, and their crops."""
        if self._shelf is None:
            return self._runner(samples.pixels)
        # Neighbours in a batch may change the last bit of a product, so they are in the key.
        pixels = xxhash.xxh3_128_hexdigest(np.ascontiguousarray(samples.crops).data)
        batch = hashlib.sha256("".join((pixels, *hashes)).encode()).hexdigest()
        keys = [hashlib.sha256(f"{batch}/{i}".encode()).hexdigest() for i in range(len(hashes))]
        known, places = self._shelf.read(keys)
        if all(places):
            return known
        logits = self._runner(samples.pixels)
        for key, row in zip(keys, logits, strict=True):
            self._shelf.put(NO_STAMP, key, row)
        return logits

    def close(self) -> None:
        """End what the cache is being given."""
        if self._shelf is not None:
            self._shelf.close()
