from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporters.session import OnnxSession


@pytest.mark.parametrize(
    ("variable", "threads", "expected"),
    [("3", 0, 3), ("2,4", 0, 2), (None, 0, 0), ("", 0, 0), ("all", 0, 0), ("3", 2, 2)],
)
def test_the_number_of_threads(
    variable: str | None,
    threads: int,
    expected: int,
    tiny_graph: Path,
    tiny_images: NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An argument comes first, then OMP_NUM_THREADS; 0 is ONNX Runtime's own choice."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    reference = OnnxSession(tiny_graph, threads=1).run(tiny_images)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    session = OnnxSession(tiny_graph, threads=threads)
    assert session._session.get_session_options().intra_op_num_threads == expected
    np.testing.assert_allclose(session.run(tiny_images)[0], reference[0], rtol=1e-4, atol=1e-5)
