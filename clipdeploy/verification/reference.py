"""The reference's logits: computed by PyTorch, or kept from an earlier run on the same images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipdeploy import vit
from clipdeploy.engines.passport import library_versions
from clipdeploy.imaging import CropCache
from clipdeploy.imaging.crop_shards import NO_STAMP
from clipdeploy.imaging.crops import Shelf
from clipdeploy.model import LoadedModel
from clipdeploy.runners.torch import TorchRunner
from exporters.artifact import Preprocess, settings_of
from exporters.samples import Samples

__all__ = ["Reference"]

_FORMAT = 2


class Reference:
    """PyTorch's logits of a batch; with a ``cache`` each batch is computed once.

    Logits are found by what decides them to the last bit: weights, recipe, preprocessing, device,
    threads, PyTorch's version, and the content of all images of the batch.
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
            "weights": model.weights.identity,
            "recipe": settings_of(model.recipe),
            "preprocess": settings_of(spec),
            "code": hashlib.sha256(Path(vit.__file__).read_bytes()).hexdigest(),
            "runner": self.name,
            "threads": self._runner.threads,
            "torch": library_versions().get("torch"),
        }
        return "logits-" + hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]

    def __call__(self, hashes: Sequence[str], samples: Samples) -> NDArray[np.float32]:
        """Logits (B, K) of B images with these SHA-256 in hex."""
        if self._shelf is None:
            return self._runner(samples.pixels)
        # Neighbours in a batch may change the last bit of a product, so they are in the key.
        batch = hashlib.sha256("".join(hashes).encode()).hexdigest()
        keys = [hashlib.sha256(f"{batch}/{i}".encode()).hexdigest() for i in range(len(hashes))]
        found = [self._shelf.get(key) for key in keys]
        known = [row for row in found if row is not None]
        if len(known) == len(keys):
            return np.stack(known)
        logits = self._runner(samples.pixels)
        for key, row in zip(keys, logits, strict=True):
            self._shelf.put(NO_STAMP, key, row)
        return logits

    def close(self) -> None:
        """End what the cache is being given."""
        if self._shelf is not None:
            self._shelf.close()
