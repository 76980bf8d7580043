from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy import zoo
from clipdeploy.model import LoadedModel
from clipdeploy.pipeline import VerifyScope, export_model, verify_model
from clipdeploy.runners import OnnxRunner
from clipdeploy.runners.base import in_parts
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.workspace import Workspace
from exporters.onnx import ExportConfig


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_a_fixed_batch_runs_any_number_of_images(
    count: int, demo_images: NDArray[np.float32], demo_model: LoadedModel, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    graph = export_model(workspace, zoo.DEMO, config=ExportConfig(batch=4)).path
    logits = OnnxRunner(graph)(demo_images[:count])
    spec = demo_model.card.preprocess(demo_model.recipe)
    expected = TorchRunner(demo_model.module, spec)(demo_images[:count])
    # float32 in two runtimes.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_parts_are_filled_and_cut() -> None:
    sizes = []

    def run(part: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(len(part))
        return part * 2

    images = np.arange(7, dtype=np.float32)[:, None]
    assert in_parts(run, images, (3, 3)).tolist() == (images * 2).tolist()
    assert in_parts(run, images, (1, 3)).tolist() == (images * 2).tolist()
    assert in_parts(run, images, (1, None)).tolist() == (images * 2).tolist()
    assert sizes == [3, 3, 3, 3, 3, 1, 7]


def test_every_kind_of_graph_is_verified_and_calibrated(tmp_path: Path) -> None:
    from clipdeploy.pipeline import CalibrateConfig, calibrate_model, convert_model, quantize_model
    from exporters.precision import Fp16Config

    workspace = Workspace(tmp_path)
    export_model(workspace, zoo.DEMO, config=ExportConfig(batch=4, preprocess=True))
    convert_model(workspace, zoo.DEMO, Fp16Config(half_io=True))
    data = zoo.demo_file("calibration.zip")
    calibrate_model(workspace, zoo.DEMO, data, CalibrateConfig(images=20))
    quantize_model(workspace, zoo.DEMO)
    result = verify_model(
        workspace, zoo.DEMO, zoo.demo_file("test.zip"), scope=VerifyScope(limit=250)
    ).verification
    assert result is not None
    # Of so few images even without a difference no drop below 1.5 points is proven.
    assert [row.verdict for row in result.rows] == ["undecided"] * 3
    assert all(row.drop is not None and row.drop.interval.high < 2.5 for row in result.rows)
