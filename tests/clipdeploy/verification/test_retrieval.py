"""The verdict on embeddings of real digits, and on embeddings with faults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from judging import each_once
from numpy.typing import NDArray

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.imaging import Labelling
from clipdeploy.models import cards
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    DeployConfig,
    Expected,
    VerifyConfig,
    VerifyScope,
    calibrate_model,
    export_model,
    merge_verification,
    quantize_model,
    verify_model,
)
from clipdeploy.stages.deploy.checks import check_labels
from clipdeploy.stages.verify.setup import Judgement
from clipdeploy.verification.disagreements import disagreements_csv
from clipdeploy.verification.records import GALLERY, ImageRecord, measure_images
from clipdeploy.verification.reports import Evidence, write_report
from clipdeploy.verification.result import Verification, verdict_line, verification_table
from clipdeploy.verification.results import (
    Results,
    merge_results,
    read_results,
    save_results,
)
from clipdeploy.verification.retrieval import with_retrieval
from clipdeploy.verification.verdicts import Limits, judge_results
from clipdeploy.workspace.folder import Workspace

MODEL = "vit-p4-32px-w96-d6-h6-e32-normalised"
# Of 500 digits: the fewest whose interval without a loss is within a point, and some more.
IMAGES = 420
INT8 = 1

Rows = NDArray[np.float32]
Fault = Callable[[Rows], Rows]


@dataclass(frozen=True)
class Judged:
    """The demo CLIP's image tower in FP32 and INT8, judged on digits."""

    workspace: Workspace
    judgement: Judgement
    results: Results

    @property
    def verification(self) -> Verification:
        assert self.judgement.verification is not None
        return self.judgement.verification


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    workspace = Workspace(tmp_path_factory.mktemp("embeddings"))
    choice = WeightsChoice(cards.demo_file("clip"), embedding="normalised")
    export_model(workspace, None, choice)
    table = calibrate_model(workspace, MODEL, cards.demo_file("calibration.zip"))
    # The softmax of an embedding is no confidence.
    assert not table.table.findings
    quantize_model(workspace, MODEL)
    # test_faults.py makes the repeated calls.
    with each_once():
        found = verify_model(
            workspace,
            MODEL,
            cards.demo_file("test.zip"),
            VerifyConfig(batch=8, workers=0, threads=1),
            VerifyScope(graphs_only=True, limit=IMAGES),
        )
    assert found.results is not None
    return Judged(workspace, found, read_results(found.results))


def rows_of(results: Results, lane: int | None = None) -> Rows:
    found = [r.embedding if lane is None else r.outcomes[lane].embedding for r in results.records]
    return np.frombuffer(b"".join(found), "<f4").reshape(len(found), -1)


def measured(results: Results, reference: Rows, artifact: Rows) -> Results:
    """The results with these embeddings of PyTorch, and of one artifact: INT8's entry."""
    records = measure_images(
        [record.image for record in results.records],
        [None] * len(results.records),
        [record.leak for record in results.records],
        reference,
        [artifact],
        keep_embeddings=True,
    )
    left = iter(records)
    batches = tuple(
        replace(
            batch,
            records=tuple(next(left) for _ in batch.records),
            repeats=batch.repeats[INT8 : INT8 + 1],
        )
        for batch in results.batches
    )
    run_key = replace(results.run_key, artifacts=results.run_key.artifacts[INT8 : INT8 + 1])
    return replace(results, run_key=run_key, batches=batches)


def with_fault(results: Results, fault: Fault) -> Verification:
    faulty = measured(results, rows_of(results), fault(rows_of(results, INT8)))
    return judge_results(faulty, 1.0)


def test_the_demo_is_equivalent(judged: Judged) -> None:
    found = judged.verification
    assert found.passed
    assert found.task == "embedding"
    assert not found.labelled
    fp32, int8 = found.rows
    assert fp32.retrieval is not None
    assert fp32.retrieval.recall1 == 100.0
    assert int8.retrieval is not None
    # Digits are alike, so the nearest of them changes more often than it leaves the nearest ten.
    assert 80 < int8.retrieval.recall1 < 100
    assert int8.retrieval.recall10 > 99
    assert int8.fidelity is not None
    assert int8.fidelity.sqnr_db is not None
    assert int8.fidelity.sqnr_db > 35
    # The agreement is over the artifact's own embeddings, the recall over PyTorch's too.
    assert int8.retrieval.recall1 <= int8.fidelity.agreement < 100
    assert int8.disagreements == round(IMAGES * (100 - int8.fidelity.agreement) / 100)


def test_unchanged_embeddings_are_equivalent(judged: Judged) -> None:
    """The twin of the faults below: the same way with no fault."""
    assert with_fault(judged.results, lambda rows: rows).passed


def turned(rows: Rows) -> Rows:
    """Its own search finds every neighbour: all cosines are as before."""
    return np.roll(rows, 1, axis=1)


def shifted(rows: Rows) -> Rows:
    return np.roll(rows, 1, axis=0)


def some_of_another_image(rows: Rows) -> Rows:
    made = rows.copy()
    made[::16] = rows[8]
    return made


def noisy(rows: Rows) -> Rows:
    noise = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    return rows + 0.15 * noise * np.sqrt((rows**2).mean())


def pulled(rows: Rows) -> Rows:
    """A bias of all embeddings alike."""
    return rows + np.float32(0.3) * rows[:1]


FAULTS: dict[str, Fault] = {
    "turned": turned,
    "of the neighbour in the batch": shifted,
    "some of another image": some_of_another_image,
    "constant": lambda rows: np.repeat(rows[:1], len(rows), axis=0),
    "twice as long": lambda rows: 2 * rows,
    "zero": np.zeros_like,
    "mirrored": lambda rows: -rows,
    "half of the dimensions": lambda rows: np.where(np.arange(rows.shape[1]) % 2, rows, 0),
    "noise": noisy,
    "bias": pulled,
    "one NaN": lambda rows: np.where(np.arange(rows.size).reshape(rows.shape) == 77, np.nan, rows),
    "one infinite": lambda rows: np.where(
        np.arange(rows.size).reshape(rows.shape) == 77, np.inf, rows
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_regressed(name: str, judged: Judged) -> None:
    def fault(rows: Rows) -> Rows:
        made: Rows = FAULTS[name](rows).astype(np.float32)
        return made

    found = with_fault(judged.results, fault)
    assert [row.verdict for row in found.rows] == ["regressed"], found.rows[0].reason


def test_a_small_loss_is_not_decided(judged: Judged) -> None:
    """2 of 420 between two images: the drop is within a point, but its interval is not."""

    def two(rows: Rows) -> Rows:
        made = rows.copy()
        made[[3, 50]] += np.float32(0.7) * rows[[120, 300]]
        return made

    found = with_fault(judged.results, two)
    assert found.rows[0].verdict == "undecided"
    assert "420 images are too few; add more images" in found.rows[0].reason
    # A search needs all images at once.
    assert "--sequential" not in found.rows[0].reason + verdict_line(found)


def test_embeddings_that_are_all_alike_prove_nothing(judged: Judged) -> None:
    alike = np.repeat(rows_of(judged.results)[:1], IMAGES, axis=0)
    alike = alike + np.random.default_rng(0).uniform(-1e-8, 1e-8, alike.shape).astype(np.float32)
    found = judge_results(measured(judged.results, alike, alike), 1.0)
    assert found.rows[0].verdict == "not judged"
    assert found.baseline.status == "implausible"
    assert "equal those of many others" in found.baseline.sentence


def test_the_neighbours_of_a_small_example(judged: Judged) -> None:
    """Angles in degrees: 0, 10, 30, 100; the artifact moves the second beside the last."""

    def at(*degrees: float) -> Rows:
        angles = np.radians(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    four = replace(judged.results, batches=judged.results.batches[:1])
    four = replace(four, batches=(replace(four.batches[0], records=four.records[:4]),))
    found = with_retrieval(measured(four, at(0, 10, 30, 100), at(0, 95, 30, 100))).records
    assert [record.reference.top for record in found] == [(1,), (0,), (1,), (2,)]
    assert [record.reference.rank for record in found] == [0, 0, 0, 0]
    own = [record.outcomes[0].answer for record in found]
    assert [answer.top for answer in own] == [(2,), (3,), (0,), (1,)]
    # Image 0 and 2 lose the second; it still lies nearer to 100 than 30 does, but not for the
    # last one, whose neighbour is now behind it, and in PyTorch's embeddings 30 is its nearest.
    assert [answer.rank for answer in own] == [1, 2, 1, 1]


def test_shards_are_judged_as_one_run(judged: Judged) -> None:
    whole = judged.results
    parts = [
        replace(whole, batches=whole.batches[first::2], shard=(first + 1, 2)) for first in (0, 1)
    ]
    assert judge_results(merge_results(parts), 1.0) == judge_results(whole, 1.0)


def test_a_second_run_reads_the_records(judged: Judged) -> None:
    before = (judged.judgement.results or Path()).read_bytes()
    again = verify_model(
        judged.workspace,
        MODEL,
        cards.demo_file("test.zip"),
        VerifyConfig(batch=8, workers=0, threads=1),
        VerifyScope(graphs_only=True, limit=IMAGES),
    )
    assert again.verification == judged.verification
    assert (again.results or Path()).read_bytes() == before


def test_embeddings_of_another_width_are_damage(judged: Judged, tmp_path: Path) -> None:
    first, *others = judged.results.batches

    def cut(record: ImageRecord) -> ImageRecord:
        return msgspec.structs.replace(record, embedding=record.embedding[:-4])

    damaged = replace(first, records=(cut(first.records[0]), *first.records[1:]))
    path = tmp_path / "verification.jsonl"
    save_results(path, replace(judged.results, batches=(damaged, *others)))
    with pytest.raises(ArtifactError, match="embeddings of another size than 128 bytes"):
        read_results(path)


def test_only_the_first_images_keep_their_embeddings(judged: Judged) -> None:
    key = replace(judged.results.run_key, batch=16)
    assert key.keeps_embeddings(GALLERY // 16 - 1)
    assert not key.keeps_embeddings(GALLERY // 16)
    assert not replace(key, task="classification").keeps_embeddings(0)


def test_reports_name_the_neighbours(judged: Judged, tmp_path: Path) -> None:
    names = {record.name for record in judged.results.records}
    rows = disagreements_csv(judged.results).decode().splitlines()[1:]
    assert rows
    assert all(row.split(",")[3] in names for row in rows)
    for suffix in ("html", "md"):
        path = tmp_path / f"report.{suffix}"
        evidence = judged.judgement.evidence
        assert evidence is not None
        write_report(path, judged.verification, Evidence(evidence.results))
        text = path.read_text()
        assert "recall@10" in text.replace("\\", "")
        assert "top-1" not in text
        assert "logit" not in text
    assert verification_table(judged.verification)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (VerifyConfig(sequential=True), "judged by the recall@10"),
        (VerifyConfig(max_drop_top5=1.0), "judged by the recall@10"),
    ],
)
def test_what_needs_labels_is_refused(judged: Judged, config: VerifyConfig, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        verify_model(judged.workspace, MODEL, cards.demo_file("test.zip"), config)


def test_merging_refuses_what_needs_labels_too(judged: Judged, tmp_path: Path) -> None:
    whole, parts = judged.results, []
    for first in (0, 1):
        parts.append(tmp_path / f"verification.{first + 1}-of-2.jsonl")
        shard = replace(whole, batches=whole.batches[first::2], shard=(first + 1, 2))
        save_results(parts[-1], shard)
    at = (judged.workspace, MODEL)
    with pytest.raises(UsageError, match="judged by the recall@10"):
        merge_verification(*at, Limits(1.0, 1.0), parts=parts)
    expecting = VerifyScope(expected=Expected("user", 90.0))
    with pytest.raises(UsageError, match="no accuracy to expect"):
        merge_verification(*at, scope=expecting, parts=parts)
    labelled = VerifyScope(labelling=Labelling(first_class=1))
    with pytest.raises(UsageError, match="labels would have no effect"):
        merge_verification(*at, scope=labelled, parts=parts)
    assert all(part.exists() for part in parts)
    assert merge_verification(*at, parts=parts).verification == judged.verification


def test_a_deployment_refuses_them_before_its_long_stages(judged: Judged) -> None:
    _, passport = judged.workspace.source(MODEL)
    config = DeployConfig(val=cards.demo_file("test.zip"))
    check_labels(config, passport)
    with pytest.raises(UsageError, match="judged by the recall@10"):
        check_labels(replace(config, verify=VerifyConfig(max_drop_top5=1.0)), passport)
