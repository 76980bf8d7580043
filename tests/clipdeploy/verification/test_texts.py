"""The verdict on text towers: that of image embeddings, with texts in the place of images.

Covers: clipdeploy/stages/verify/texts.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from demo_workspaces import EMBEDDER
from graph_edits import write
from onnx import ModelProto, helper, numpy_helper
from passport_edits import put, restamp

from clipdeploy.core.errors import ClipdeployError
from clipdeploy.imaging import Labelling
from clipdeploy.models import cards
from clipdeploy.pipeline import (
    VerifyConfig,
    VerifyScope,
    Workspace,
    verify_model,
    verify_texts,
    write_reports,
)
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.verification.result import heading
from clipdeploy.verification.results import read_results

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = (
    *WORDS,
    "null",
    "eins",
    "zwei",
    "drei",
    "vier",
    "fünf",
    "sechs",
    "sieben",
    "acht",
    "neun",
)
PLACES = (
    "{}",
    "a photo of the digit {}",
    "das Foto der Ziffer {}",
    "{} apples in a basket",
    "a blurry {}",
    "page {} of the book",
)
# The interval of 119 texts without a loss is 3.1 points wide.
CONFIG = VerifyConfig(max_drop=5)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """119 texts, of which one is cut, and one more that has the ids of another."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    lines = [place.format(number) for place in PLACES for number in NUMBERS]
    lines[-2:] = ["seven " * 80, "A photo of the digit ZERO"]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def judged(
    workspace: Workspace,
    texts: Path,
    *artifacts: Path,
    note: Callable[[str], object] = lambda text: None,
) -> Judgement:
    return verify_texts(workspace, EMBEDDER, texts, CONFIG, VerifyScope(artifacts), note=note)


def test_both_graphs_are_equivalent(copied_towers: Workspace, texts: Path, tmp_path: Path) -> None:
    notes = list[str]()
    found = judged(copied_towers, texts, note=notes.append)
    assert found
    result = found.verification
    assert result is not None
    assert (result.task, result.tower) == ("embedding", "text")
    assert (result.images, result.copies, result.listed) == (119, 1, 120)
    assert [(row.precision, row.verdict) for row in result.rows] == [
        *(("fp32", "equivalent"), ("fp16", "equivalent"))
    ]
    for row, least in zip(result.rows, (100, 50), strict=True):
        assert row.retrieval is not None
        assert row.fidelity is not None
        assert row.fidelity.sqnr_db is not None
        assert row.fidelity.sqnr_db > least
        assert row.repeats is not None
        assert row.repeats
    assert notes == ["1 of 120 texts are longer than CLIP's 77 tokens and are cut"]
    assert f"{EMBEDDER} on 119 texts of {texts}" in heading(result)
    # The records name the texts, and a second run only reads them.
    saved = copied_towers.text_verification(EMBEDDER)
    assert found.results == saved
    assert "fünf apples in a basket" in {record.name for record in read_results(saved).records}
    before = saved.stat().st_mtime_ns
    assert judged(copied_towers, texts).verification == result
    assert saved.stat().st_mtime_ns == before
    reports = [tmp_path / f"verdict.{kind}" for kind in ("html", "md", "json")]
    write_reports(found, reports)
    assert json.loads(reports[2].read_text())["tower"] == "text"
    assert "texts have no pixels" in reports[0].read_text()


def without_mask(model: ModelProto) -> None:
    write(model, "mask", np.zeros((77, 77)))


def ends_at_the_start(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "ArgMax").op_type = "ArgMin"


def mixed_with_the_batch(model: ModelProto) -> None:
    last = model.graph.node[-1]
    last.output[0] = "alone"
    axis = numpy_helper.from_array(np.array([0]), "first axis")
    model.graph.initializer.append(axis)
    model.graph.node.append(helper.make_node("ReduceMean", ["alone", "first axis"], ["mean"]))
    model.graph.node.append(helper.make_node("Add", ["alone", "mean"], ["embedding"]))


@pytest.mark.parametrize(
    ("fault", "verdict", "reason"),
    [
        (without_mask, "regressed", "below 20 dB|recall@10"),
        (ends_at_the_start, "regressed", "below 20 dB|recall@10"),
        (mixed_with_the_batch, "not judged", "not repeatable"),
    ],
)
def test_a_wrong_graph_is_not_equivalent(
    fault: Callable[[ModelProto], None],
    verdict: str,
    reason: str,
    towers: Workspace,
    texts: Path,
    tmp_path: Path,
) -> None:
    model = onnx.load(towers.graph(EMBEDDER, "fp32", "text"))
    fault(model)
    onnx.save(model, tmp_path / "wrong.onnx")
    found = verify_texts(
        towers,
        EMBEDDER,
        texts,
        CONFIG,
        VerifyScope((tmp_path / "wrong.onnx",)),
        keep=tmp_path / "records.jsonl",
    )
    assert not found
    assert found.verification is not None
    [row] = found.verification.rows
    assert row.verdict == verdict, row.reason
    assert re.search(reason, row.reason)


FAULTS: dict[str, tuple[Callable[[Workspace, Path], object], str]] = {
    "an image tower": (
        lambda w, texts: judged(w, texts, w.graph(EMBEDDER, "fp32")),
        "is no text tower",
    ),
    "a text tower with images": (
        lambda w, texts: verify_model(
            w,
            EMBEDDER,
            cards.demo_file("test.zip"),
            scope=VerifyScope((w.graph(EMBEDDER, "fp32", "text"),)),
        ),
        "is a text tower, which takes token ids, not images",
    ),
    "labels": (
        lambda w, texts: verify_texts(
            w, EMBEDDER, texts, scope=VerifyScope(labelling=Labelling(layout="none"))
        ),
        "texts have no labels",
    ),
    "a shard": (
        lambda w, texts: verify_texts(w, EMBEDDER, texts, VerifyConfig(shard=(1, 2))),
        "texts have no labels",
    ),
    "another tokenizer": (
        lambda w, texts: (
            w.graph(EMBEDDER, "fp16", "text").unlink(),
            restamp(w.graph(EMBEDDER, "fp32", "text"), put("settings.tokenizer_sha256", "0" * 64)),
            judged(w, texts),
        ),
        "another tokenizer",
    ),
    "no file": (lambda w, texts: judged(w, texts.with_name("gone.txt")), "is no file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str, copied_towers: Workspace, texts: Path) -> None:
    act, message = FAULTS[fault]
    with pytest.raises(ClipdeployError, match=message):
        act(copied_towers, texts)
