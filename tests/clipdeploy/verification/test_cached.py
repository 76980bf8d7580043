"""Records of earlier runs are reused artifact by artifact, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from clipdeploy.imaging import ImageEntry, ImageFolder
from clipdeploy.verification.cached import CachedRecords, read_cached
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.results import ArtifactEntry, Results, read_results, save_results

Make = Callable[..., Results]
One = Callable[..., ImageRecord]

FIRST = ArtifactEntry("a.onnx", "graph", "fp32", "1" * 64, "ONNX Runtime (CPU)")
SECOND = ArtifactEntry("b.onnx", "graph", "int8", "2" * 64, "ONNX Runtime (CPU)")
ENGINE = ArtifactEntry("b.engine", "engine", "int8", "3" * 64, "", why_not="no GPU")


@pytest.fixture
def whole(made: Make, one: One) -> Results:
    """Four batches of two artifacts; the second one is wrong about every third image."""
    records = [one(i, artifacts=(True, i % 3 != 0)) for i in range(50)]
    return made(records, artifacts=(FIRST, SECOND))


@pytest.fixture
def images(whole: Results) -> ImageFolder:
    entries = tuple(ImageEntry(record.name, record.label) for record in whole.records)
    return ImageFolder(Path("digits"), entries)


def wanting(results: Results, *artifacts: ArtifactEntry) -> Results:
    run_key = replace(results.run_key, artifacts=artifacts)
    return replace(results, run_key=run_key, batches=())


def lane(results: Results, number: int) -> list[object]:
    return [record.outcomes[number] for record in results.records]


def test_fewer_artifacts_are_taken_out_of_more(whole: Results) -> None:
    for number, entry in enumerate((FIRST, SECOND)):
        known = CachedRecords(wanting(whole, entry), [whole])
        found = known.results(range(4))
        assert lane(found, 0) == lane(whole, number)
        assert found.repeats(0) == whole.repeats(number)
    # In another order, and with an engine without a runner.
    found = CachedRecords(wanting(whole, SECOND, ENGINE, FIRST), [whole]).results(range(4))
    assert lane(found, 0) == lane(whole, 1)
    assert lane(found, 1) == lane(whole, 0)


def test_an_artifact_that_was_replaced_is_not_known(whole: Results) -> None:
    for changed in (
        replace(FIRST, sha256="0" * 64),
        replace(FIRST, runner="TensorRT"),
        replace(FIRST, emulated=True),
        replace(FIRST, calibration=None),
        replace(FIRST, artifact="elsewhere.onnx"),
    ):
        known = CachedRecords(wanting(whole, changed, SECOND), [whole])
        assert known.missing(0) == (changed,)
        assert known.results(range(4)).batches == ()


def test_only_the_missing_artifact_is_run(whole: Results) -> None:
    alone = CachedRecords(wanting(whole, FIRST), [whole]).results(range(4))
    known = CachedRecords(wanting(whole, FIRST, SECOND), [alone])
    assert known.missing(2) == (SECOND,)
    fresh = CachedRecords(wanting(whole, SECOND), [whole]).whole(2)
    assert fresh is not None
    assert known.completed(fresh, (SECOND,)) == whole.batches[2]
    # The same images with other answers of the reference: nothing is reused.
    first, *rest = fresh.records
    other = type(first)(first.image, first.label, "", 1.0, first.reference, first.outcomes)
    assert known.completed(replace(fresh, records=(other, *rest)), (SECOND,)) is None


def test_a_finished_run_keeps_the_other_artifacts(whole: Results) -> None:
    wanted = wanting(whole, FIRST)
    known = CachedRecords(wanted, [whole])
    both = known.with_others(known.results(range(4)))
    assert both.run_key.artifacts == (FIRST, SECOND)
    assert both.batches == whole.batches
    # Of a part of the images only: left out of a finished file.
    half = replace(whole, batches=whole.batches[:2])
    known = CachedRecords(wanted, [half])
    alone = CachedRecords(wanted, [whole]).results(range(4))
    assert known.with_others(alone) == alone


def test_what_a_run_goes_on_from(whole: Results, images: ImageFolder, tmp_path: Path) -> None:
    kept, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.partial"
    wanted, paths = wanting(whole, FIRST, SECOND), (kept, partial)
    assert read_cached(paths, wanted, images).results(range(4)) == wanted
    save_results(partial, replace(whole, batches=whole.batches[1:3]))
    assert read_cached(paths, wanted, images).results(range(4)).done == {1, 2}
    save_results(kept, replace(whole, batches=whole.batches[:1]))
    assert read_cached(paths, wanted, images).results(range(4)).done == {0, 1, 2}
    # A run that stops early shares its records with one that does not.
    early = replace(whole, run_key=replace(whole.run_key, sequential=1.0))
    save_results(kept, early)
    assert read_cached(paths, wanted, images).results(range(4)) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 8},
        {"weights": "0"},
        {"entries": "0"},
        {"contents": "0"},
        {"decoder": "0"},
        {"calibrated": "0"},
        {"threads": 9},
        {"versions": {"torch": "3"}},
        {"reference": "PyTorch on another GPU"},
    ],
)
def test_another_question_shares_nothing(
    change: dict[str, object], whole: Results, images: ImageFolder, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    wanted = wanting(whole, FIRST)
    other = replace(wanted, run_key=replace(wanted.run_key, **change))  # type: ignore[arg-type]
    assert not read_cached([path], other, images).results(range(4)).batches


def test_other_files_share_nothing(whole: Results, images: ImageFolder, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    wanted = wanting(whole, FIRST)
    for other in (
        replace(wanted, stamps="0"),
        replace(wanted, data="elsewhere"),
        replace(wanted, shard=(1, 2)),
    ):
        assert not read_cached([path], other, images).results(range(4)).batches
    # Files that were changed just now have no stamps: their state is unknown.
    save_results(path, replace(whole, stamps=""))
    assert not read_cached([path], replace(wanted, stamps=""), images).results(range(4)).batches


def test_records_of_other_images_are_not_believed(
    whole: Results, images: ImageFolder, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    wanted = wanting(whole, FIRST)
    first, second, *rest = images.entries
    far = images.entries[40]
    for entries in (
        (replace(first, label=9), second, *rest),
        (replace(first, name="0/other.png"), second, *rest),
        (far, second, *rest[:38], first, *rest[39:]),
    ):
        found = read_cached([path], wanted, ImageFolder(images.root, tuple(entries)))
        assert not found.results(range(4)).batches
    assert read_cached([path], wanted, images).results(range(4)).batches


def test_damaged_records_are_done_again(
    whole: Results, images: ImageFolder, tmp_path: Path
) -> None:
    kept, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.partial"
    save_results(kept, whole)
    kept.write_bytes(kept.read_bytes().replace(b"0.4", b"0.3", 1))
    wanted = wanting(whole, FIRST, SECOND)
    assert not read_cached((kept, partial), wanted, images).results(range(4)).batches
    save_results(partial, whole)
    assert read_cached((kept, partial), wanted, images).results(range(4)) == whole
    assert read_results(partial) == whole
