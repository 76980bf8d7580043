"""The results file: written, cut, damaged, resumed, merged."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from clipdeploy.core.errors import ArtifactError, FileError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess
from clipdeploy.verification.records import ImageRecord
from clipdeploy.verification.results import (
    Results,
    ResultsWriter,
    merge_results,
    read_results,
    save_results,
)

Make = Callable[..., Results]
One = Callable[..., ImageRecord]


@pytest.fixture
def whole(made: Make, one: One) -> Results:
    """Four batches: 16, 16, 16 and 2 images, one of which is wrong and one NaN."""
    records = [one(i, artifacts=(i != 20,), finite=i != 33) for i in range(50)]
    return made(records)


def shard(results: Results, first: int, count: int) -> Results:
    return replace(results, batches=results.batches[first - 1 :: count], shard=(first, count))


def test_a_file_gives_back_what_was_written(whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    assert read_results(path) == whole
    first = whole.batches[0]
    unreadable = replace(first, records=first.records[1:], unreadable=("0/broken.png",))
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
            with pytest.raises(ArtifactError, match="is not a readable results file"):
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
        with pytest.raises(ArtifactError, match="is not a readable results file"):
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
    save_results(path, replace(whole, run_key=replace(whole.run_key, schema=99)))
    with pytest.raises(ArtifactError, match="newer clipdeploy") as caught:
        read_results(path)
    assert "upgrade" in caught.value.hint


def test_an_older_schema_is_not_misread(whole: Results, tmp_path: Path) -> None:
    """Rows without names: with a missing field they would be read as other values."""
    path = tmp_path / "results.jsonl"
    save_results(path, replace(whole, run_key=replace(whole.run_key, schema=2)))
    with pytest.raises(ArtifactError, match="older clipdeploy") as caught:
        read_results(path)
    assert caught.value.hint == "verify again"


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1]


def put_lines(path: Path, lines: Sequence[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def edited_header(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b"a" * 64, b"0" * 64), *lines[1:]]


def edited_answer(lines: list[bytes]) -> list[bytes]:
    """One of the reference's answers is edited to be right."""
    return [*lines[:3], lines[3].replace(b"1],[[[", b"0],[[[", 1), *lines[4:]]


def other_run(lines: list[bytes]) -> list[bytes]:
    """A line with a valid checksum, but of a file with another first line."""
    return [lines[0].replace(b"digits", b"others"), *lines[1:]]


EDITS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "a line repeated": lambda lines: [*lines, lines[1]],
    "a line repeated at once": lambda lines: [*lines[:2], lines[1], *lines[2:]],
    "all lines repeated": lambda lines: [lines[0], *lines[1:], *lines[1:]],
    "a line left out": lambda lines: [*lines[:2], *lines[3:]],
    "two lines exchanged": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "another artifact's hash in the header": edited_header,
    "other images in the header": other_run,
    "one digit of a figure": lambda lines: [*lines[:2], lines[2].replace(b"0.4", b"0.3", 1)],
    "one answer": lambda lines: [*lines[:2], lines[2].replace(b"[[4,5", b"[[5,4", 1)],
    "a checksum": lambda lines: [*lines[:2], lines[2][:10] + b"0" + lines[2][11:]],
    "two headers": lambda lines: [lines[0], *lines],
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_file_is_refused(name: str, whole: Results, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    save_results(path, whole)
    lines = lines_of(path)
    changed = EDITS[name](lines)
    assert changed != lines
    put_lines(path, changed)
    with pytest.raises(ArtifactError, match="is not a readable results file"):
        read_results(path)


IMPOSSIBLE: dict[str, Callable[[Results], Results]] = {
    "a batch twice": lambda r: replace(r, batches=(*r.batches, r.batches[0])),
    "a batch too many": lambda r: replace(r, batches=(*r.batches, replace(r.batches[0], batch=4))),
    "more images than a batch has": lambda r: replace(
        r, batches=(replace(r.batches[0], records=r.batches[0].records * 2), *r.batches[1:])
    ),
    "fewer images than a batch has": lambda r: replace(
        r, batches=(replace(r.batches[0], records=r.batches[0].records[:-1]), *r.batches[1:])
    ),
    "an image twice": lambda r: replace(
        r, batches=(r.batches[0], replace(r.batches[0], batch=1), *r.batches[2:])
    ),
    "an artifact without outcomes": lambda r: replace(
        r, run_key=replace(r.run_key, artifacts=r.run_key.artifacts * 2)
    ),
    "no repeated calls": lambda r: replace(
        r, batches=tuple(replace(batch, repeats=()) for batch in r.batches)
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_results_that_cannot_be_are_refused(name: str, whole: Results, tmp_path: Path) -> None:
    """Their checksums are right, as if a program had written them."""
    path = tmp_path / "results.jsonl"
    save_results(path, IMPOSSIBLE[name](whole))
    with pytest.raises(ArtifactError, match="has impossible results"):
        read_results(path)


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
    other = replace(batch, records=batch.records[::-1])
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
        ("calibrated", "0"),
        ("contents", "0"),
        ("decoder", "0"),
        ("preprocess", Preprocess(32, CLIP_STD, CLIP_MEAN)),
        ("labelled", False),
    ],
)
def test_shards_of_another_run_are_refused_by_what_differs(
    field: str, value: object, whole: Results
) -> None:
    first, second = shard(whole, 1, 2), shard(whole, 2, 2)
    other = replace(second, run_key=replace(second.run_key, **{field: value}))
    with pytest.raises(ArtifactError, match=f"not of one run: they differ in {field}"):
        merge_results([first, other])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("batch", 10**9),
        ("images", -1),
        ("classes", 10**12),
        ("model", "../../x"),
        ("versions", {"torch": "2\nx"}),
        ("preprocess", Preprocess(0, CLIP_MEAN, CLIP_STD)),
    ],
)
def test_a_question_that_cannot_be(
    field: str, value: object, whole: Results, tmp_path: Path
) -> None:
    """The checksums are right: they have no key, and anyone can write them."""
    path = tmp_path / "results.jsonl"
    run_key = replace(whole.run_key, **{field: value})  # type: ignore[arg-type]
    save_results(path, replace(whole, run_key=run_key))
    with pytest.raises(ArtifactError, match=f"has an invalid value: {field}"):
        read_results(path)
