from __future__ import annotations

import pytest

from clipdeploy.engines.backends import tensorrt_module
from clipdeploy.engines.compiler import Compiler


@pytest.fixture
def compiler() -> Compiler:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX has no wheel for this platform")
    return Compiler("tensorrt-rtx", tensorrt_module("tensorrt-rtx"))
