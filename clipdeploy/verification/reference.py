"""Computes the reference's logits with PyTorch, or reads them from the cache."""

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
from clipdeploy.imaging.keys import digest_of, pixels_key
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.workspace.proof import reference_code
from exporters.samples import GraphSamples, Samples

__all__ = ["Reference"]

_FORMAT = 3


class Reference:
    """Computes PyTorch's logits of a batch; with a ``cache`` each batch is computed once.

    The cache key has everything that determines the logits to the last bit: everything that
    determines pixels (see :func:`clipdeploy.imaging.keys.pixels_key`), mean and std, weights,
    recipe, the code that turns crops into logits, device, threads, PyTorch's version, and the files
    and crops of the batch.
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
            "code": reference_code(),
            "runner": self.name,
            "threads": self._runner.threads,
            "torch": library_versions().get("torch"),
            # The kernels that PyTorch chooses for a processor affect the last bits.
            "processor": torch.backends.cpu.get_cpu_capability(),
        }
        return f"logits-{digest_of(decides)}"

    @property
    def cache_problem(self) -> str:
        """Why no further logits are cached, as a sentence; empty if they are."""
        return self._shelf.problem if self._shelf is not None else ""

    def __call__(self, hashes: Sequence[str], samples: GraphSamples) -> NDArray[np.float32]:
        """Return the logits (B, K) of B images: hex SHA-256 of their files, and their crops."""
        assert isinstance(samples, Samples)
        if self._shelf is None:
            return self._runner(samples.pixels)
        # The key has the whole batch: neighbours may change the last bit of a product.
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
        """Finish writing to the cache."""
        if self._shelf is not None:
            self._shelf.close()
