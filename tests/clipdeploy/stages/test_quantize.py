from __future__ import annotations

import shutil
from pathlib import Path

from clipdeploy.models import cards
from clipdeploy.stages.quantize import _judged_images, model_quality
from clipdeploy.workspace.folder import Workspace


def test_float16_is_judged_on_calibration_images_where_there_are_some(
    demo_workspace: Workspace, tmp_path: Path
) -> None:
    _, passport = demo_workspace.source(cards.DEMO)
    judged = _judged_images(demo_workspace, cards.DEMO, passport.preprocess)
    # Eight of the calibration, then three of the package.
    assert len(judged.crops) == 11
    bare = Workspace(tmp_path)
    bare.folder(cards.DEMO).mkdir(parents=True)
    shutil.copy(demo_workspace.graph(cards.DEMO, "fp32"), bare.folder(cards.DEMO))
    alone = _judged_images(bare, cards.DEMO, passport.preprocess)
    assert (alone.crops == judged.crops[8:]).all()
    assert model_quality(bare, cards.DEMO) is None


def test_the_demos_int8_graph_is_sound(demo_workspace: Workspace) -> None:
    quality = model_quality(demo_workspace, cards.DEMO)
    assert quality is not None
    assert quality.sqnr_db is not None
    # Measured 43 dB; what is warned about begins at 20.
    assert quality.sqnr_db > 38
    assert (quality.images, quality.warnings) == (8, ())
