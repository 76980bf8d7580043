"""Runs the reference module in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from clipdeploy.core.device import gpus, warn_of_cpu
from clipdeploy.core.passport import Preprocess, TensorSpec
from clipdeploy.runners.base import Closing, Images, Logits

__all__ = ["TorchRunner", "full_float32"]


def _float32_settings() -> tuple[Any, ...]:
    """PyTorch's settings for float32 in matrix products and convolutions, on GPUs and CPUs."""
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv


def _global_precision() -> str | None:
    """``torch.get_float32_matmul_precision()``; None if it contradicts the newer settings.

    PyTorch then refuses to read it.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _why_no_gpu() -> str:
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return f"PyTorch {torch.__version__} for CUDA {torch.version.cuda} does not see it"


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products and convolutions in float32, without TF32 and bfloat16.

    TF32 has 10 of float32's 23 bits of mantissa, bfloat16 has 7.  The settings apply to the whole
    process, and are restored at the end.  Nothing else changes, such as whether cuDNN is used
    (``torch.backends.cudnn.flags`` would also set that).
    """
    settings = _float32_settings()
    before, global_before = [each.fp32_precision for each in settings], _global_precision()
    try:
        # PyTorch refuses products if the global precision contradicts the settings.
        if global_before is not None:
            torch.set_float32_matmul_precision("highest")
        for each in settings:
            each.fp32_precision = "ieee"
        yield
    finally:
        if global_before is not None:
            torch.set_float32_matmul_precision(global_before)
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


class TorchRunner(Closing):
    """Runs the reference module in float32, on the GPU if PyTorch has one.

    If there is a GPU that PyTorch cannot use, it warns once per process
    (:class:`clipdeploy.core.device.CpuFallback`).

    ``takes`` is the module's input, or the preprocessing of images.  ``threads`` is set for the
    whole process; 0 keeps the current number.
    """

    def __init__(self, module: nn.Module, takes: Preprocess | TensorSpec, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        on_gpu = torch.cuda.is_available()
        if not on_gpu and gpus():
            warn_of_cpu("the PyTorch reference runs", _why_no_gpu())
        self._device = torch.device("cuda" if on_gpu else "cpu")
        self._module = module.to(self._device)
        self.threads = torch.get_num_threads()
        self.name = f"PyTorch on {torch.cuda.get_device_name()}" if on_gpu else "PyTorch"
        if isinstance(takes, Preprocess):
            takes = TensorSpec("image", "float32", ("batch", 3, takes.size, takes.size))
        self.input = takes
        self.batches: tuple[int, int | None] = (1, None)

    def __call__(self, images: Images) -> Logits:
        """See :class:`Runner`."""
        with torch.inference_mode(), full_float32():
            logits = self._module(torch.from_numpy(images).to(self._device))
            return cast(Logits, logits.cpu().numpy())
