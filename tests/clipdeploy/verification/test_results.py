"""The results file: written, cut, damaged, resumed, merged."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.results import (
    BatchResult,
    Results,
    ResultsWriter,
    merge_results,
    read_results,
    resume_results,
    save_results,
)
from exporters.errors import ArtifactError, FileError

Make = Callable[..., Results]
One = Callable[..., ImageRecord]


@pytest.fixture
def whole(made: Make, one: One) -> Results:
    """Four batches: 16, 16, 16 and 2 images, one of which is off and one is NaN."""
    records = [one(i, artifacts=(i != 20,), finite=i != 33) for i in range(50)]
    return made(records)


def shard(results: Results, first: int, count: int) -> Results:
    return replace(results, batches=results.batches[first - 1 :: count], shard=(first, count))


def test_a_file_gives_back_what_was_written(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    assert read_results(path) == whole
    unreadable = replace(whole.batches[0], unreadable=("0/broken.png",))
    odd = replace(whole, batches=(unreadable, *whole.batches[1:]), shard=(1, 1))
    save_results(path, odd)
    assert read_results(path) == odd
    assert read_results(path).unreadable == ("0/broken.png",)


def test_batches_come_in_order_whatever_the_files(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, replace(whole, batches=whole.batches[::-1]))
    assert read_results(path) == whole


def test_a_writer_appends_and_a_reader_sees_it(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    first, second, *_ = whole.batches
    with closing(ResultsWriter(path, replace(whole, batches=(first,)))) as writer:
        assert read_results(path).batches == (first,)
        writer.append(second)
        assert read_results(path).batches == (first, second)


def test_a_writer_that_cannot_write_says_so(whole: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write"):
        ResultsWriter(tmp_path / "file" / "results.jsonl", whole)


def test_cut_anywhere_it_holds_whole_batches_or_is_refused(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    generator = random.Random(0)
    for cut in [*ends, *(end + 1 for end in ends), *generator.sample(range(len(data)), 40)]:
        path.write_bytes(data[:cut])
        if cut < ends[0]:
            with pytest.raises(ArtifactError, match="holds no results that can be read"):
                read_results(path)
            continue
        found = read_results(path)
        assert found.batches == whole.batches[: sum(end < cut for end in ends[1:])]


@pytest.mark.parametrize("line", [0, 2])
def test_a_damaged_line_is_refused(line: int, whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    lines = path.read_bytes().split(b"\n")
    for spoilt in (b"", lines[line][:-3], b"\xff" + lines[line], lines[line].replace(b":", b"", 1)):
        path.write_bytes(b"\n".join([*lines[:line], spoilt, *lines[line + 1 :]]))
        with pytest.raises(ArtifactError, match="holds no results that can be read"):
            read_results(path)


def test_what_is_no_results_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for data in (b"", b"\n", b"{}\n", b"[1, 2]\n", b"\x00" * 100, b'{"question": {}}\n'):
        path.write_bytes(data)
        with pytest.raises(ArtifactError):
            read_results(path)
    with pytest.raises(FileError, match="cannot read"):
        read_results(tmp_path / "gone.jsonl")


def test_a_newer_schema_is_told(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, replace(whole, question=replace(whole.question, schema=99)))
    with pytest.raises(ArtifactError, match="newer clipdeploy") as caught:
        read_results(path)
    assert "upgrade" in caught.value.hint


def test_a_run_goes_on_only_from_its_own_results(whole: Results, tmp_path: Path) -> None:
    kept, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.partial"
    half = replace(whole, batches=whole.batches[:2])
    wanted = replace(whole, batches=())
    paths = (kept, partial)
    assert resume_results(paths, wanted) == wanted
    save_results(partial, half)
    assert resume_results(paths, wanted) == half
    save_results(kept, whole)
    assert resume_results(paths, wanted) == whole
    # Another question, other files, another shard: nothing of it is taken.
    question = whole.question
    (graph,) = question.artifacts
    for other in (
        replace(wanted, question=replace(question, batch=8)),
        replace(wanted, question=replace(question, artifacts=(replace(graph, sha256="0"),))),
        replace(wanted, question=replace(question, versions={"torch": "3"})),
        replace(wanted, question=replace(question, entries="0")),
        replace(wanted, stamps="0"),
        replace(wanted, shard=(1, 2)),
        replace(wanted, data="elsewhere"),
    ):
        assert resume_results(paths, other) == other
    # Files that were changed just now have no stamps: nobody can tell.
    unsure = replace(wanted, stamps="")
    save_results(kept, replace(whole, stamps=""))
    assert resume_results(paths, unsure) == unsure


def test_damaged_results_are_done_again(whole: Results, tmp_path: Path) -> None:
    kept, partial = tmp_path / "results.jsonl", tmp_path / "results.jsonl.partial"
    kept.write_bytes(b"damaged")
    save_results(partial, whole)
    assert resume_results((kept, partial), replace(whole, batches=())) == whole


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_merged_shards_are_one_run(count: int, whole: Results) -> None:
    parts = [shard(whole, i, count) for i in range(1, count + 1)]
    merged = merge_results(random.Random(0).sample(parts, count))
    assert merged == whole
    assert merged.records == whole.records


def test_a_shard_given_twice_changes_nothing(whole: Results) -> None:
    first, second = shard(whole, 1, 2), shard(whole, 2, 2)
    assert merge_results([first, second, first]).batches == whole.batches


def test_what_cannot_be_merged(whole: Results) -> None:
    first, second, third = (shard(whole, i, 3) for i in (1, 2, 3))
    with pytest.raises(ArtifactError, match="no shard to merge"):
        merge_results([])
    with pytest.raises(ArtifactError, match="1 of 4 batches are missing"):
        merge_results([first, third])
    with pytest.raises(ArtifactError, match="1 of 4 batches are missing"):
        merge_results([replace(first, batches=first.batches[:1]), second, third])
    batch = second.batches[0]
    other = BatchResult(batch.batch, batch.records[::-1])
    with pytest.raises(ArtifactError, match=r"two shards differ on batch 1"):
        merge_results([first, second, third, replace(second, batches=(other,))])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weights", "0"),
        ("entries", "0"),
        ("batch", 8),
        ("threads", 7),
        ("artifacts", ()),
        ("versions", {"torch": "3"}),
        ("calibrated", None),
        ("labelled", False),
    ],
)
def test_shards_of_another_run_are_refused_by_what_differs(
    field: str, value: object, whole: Results
) -> None:
    first, second = shard(whole, 1, 2), shard(whole, 2, 2)
    other = replace(second, question=replace(second.question, **{field: value}))
    with pytest.raises(ArtifactError, match=f"not of one run: they differ in {field}"):
        merge_results([first, other])
