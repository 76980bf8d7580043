"""The reference's float32: the settings of PyTorch while it runs and after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice, load_model
from clipdeploy.runners.torch import TorchRunner, full_float32
from exporters.metrics import sqnr_db

BACKENDS = torch.backends


def global_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "contradicts"


def settings() -> dict[str, object]:
    return {
        "cuDNN": BACKENDS.cudnn.enabled,
        "benchmark": BACKENDS.cudnn.benchmark,
        "matmul": BACKENDS.cuda.matmul.fp32_precision,
        "conv": BACKENDS.cudnn.conv.fp32_precision,
        "matmul on a CPU": BACKENDS.mkldnn.matmul.fp32_precision,
        "conv on a CPU": BACKENDS.mkldnn.conv.fp32_precision,
        "global": global_precision(),
    }


def new_matmul() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def bfloat16_on_a_cpu() -> None:
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    BACKENDS.mkldnn.conv.fp32_precision = "bf16"


def no_cudnn() -> None:
    BACKENDS.cudnn.enabled = False


CHOICES: dict[str, Callable[[], object]] = {
    "defaults": lambda: None,
    "global high": lambda: torch.set_float32_matmul_precision("high"),
    "global medium": lambda: torch.set_float32_matmul_precision("medium"),
    "TF32 by the new setting": new_matmul,
    "bfloat16 on a CPU": bfloat16_on_a_cpu,
    "cuDNN switched off": no_cudnn,
}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = settings()
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.enabled = before["cuDNN"]
    BACKENDS.cuda.matmul.fp32_precision = before["matmul"]
    BACKENDS.cudnn.conv.fp32_precision = before["conv"]
    BACKENDS.mkldnn.matmul.fp32_precision = before["matmul on a CPU"]
    BACKENDS.mkldnn.conv.fp32_precision = before["conv on a CPU"]
    assert settings() == before


@pytest.mark.parametrize("choice", CHOICES)
def test_the_reference_runs_in_full_float32_and_restores_the_settings(choice: str) -> None:
    seen: list[dict[str, object]] = []

    class Seeing(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(settings())
            return images.mean(dim=(2, 3))

    CHOICES[choice]()
    before = settings()
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    TorchRunner(Seeing(), spec)(np.zeros((2, 3, 4, 4), np.float32))
    (during,) = seen
    precisions = {name: value for name, value in during.items() if "mat" in name or "conv" in name}
    assert set(precisions.values()) == {"ieee"}
    assert during["global"] == "highest"
    # `cudnn.flags` has the default enabled=False, which disables cuDNN.
    assert during["cuDNN"] == before["cuDNN"]
    assert settings() == before


@pytest.mark.gpu
def test_the_reference_on_a_gpu_equals_that_on_the_cpu(demo_images: NDArray[np.float32]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch is built without CUDA")
    # Not the session's model: the runner moves its module to the GPU.
    model = load_model(cards.find(cards.DEMO), WeightsChoice(), Recipe())
    images = torch.from_numpy(demo_images)
    with torch.inference_mode():
        expected = model.module(images).numpy()
        runner = TorchRunner(model.module, model.card.preprocess(model.recipe))
        assert runner.name == f"PyTorch on {torch.cuda.get_device_name()}"
        exact = sqnr_db(expected, runner(demo_images))
        torch.set_float32_matmul_precision("high")
        rounded = sqnr_db(expected, model.module(images.cuda()).cpu().numpy())
    # ONNX Runtime, which sums in another order, has 130 dB; operands with TF32's 10 bits have 70.
    assert exact is not None
    assert exact > 100
    if torch.cuda.get_device_capability() >= (8, 0):
        assert rounded is not None
        assert rounded < 90


def test_the_settings_are_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("high")
    before = settings()
    with pytest.raises(KeyboardInterrupt), full_float32():
        raise KeyboardInterrupt
    assert settings() == before
    assert before["matmul"] == "tf32"


def test_cudnn_flags_alone_would_not_do() -> None:
    torch.set_float32_matmul_precision("high")
    with BACKENDS.cudnn.flags(allow_tf32=False):
        during = settings()
    assert during["matmul"] == "tf32"
    assert not during["cuDNN"]
