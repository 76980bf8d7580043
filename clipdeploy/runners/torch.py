"""Runs the reference module in PyTorch."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from clipdeploy.core.passport import Preprocess, TensorSpec
from clipdeploy.runners.base import Closing, Images, Logits

__all__ = ["TorchRunner"]


class TorchRunner(Closing):
    """Runs the reference module in float32, on the GPU if PyTorch has one.

    ``threads`` is set for the whole process; 0 keeps the current number.
    """

    def __init__(self, module: nn.Module, preprocess: Preprocess, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        on_gpu = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._module = module.to(self._device)
        self.threads = torch.get_num_threads()
        self.name = f"PyTorch on {torch.cuda.get_device_name()}" if on_gpu else "PyTorch"
        size = preprocess.size
        self.input = TensorSpec("image", "float32", ("batch", 3, size, size))
        self.batches: tuple[int, int | None] = (1, None)

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        # TF32 would cost the reference 13 of its 23 bits of mantissa.
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            logits = self._module(torch.from_numpy(images).to(self._device))
            return cast(Logits, logits.cpu().numpy())
