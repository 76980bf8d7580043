from __future__ import annotations

import pytest

from clipdeploy.core.errors import GraphError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad axis"), "bad axis"),
        (
            RuntimeError("\n  [ONNXRuntimeError] : 1 : FAIL \nsecond line\n"),
            "[ONNXRuntimeError] : 1 : FAIL",
        ),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n "), "RuntimeError"),
        (GraphError("no logits", hint="export again"), "no logits (export again)"),
        ("TensorRT: refused\nat line 3", "TensorRT: refused"),
        ("", "no reason given"),
    ],
)
def test_first_line(error: Exception | str, line: str) -> None:
    assert first_line(error) == line
