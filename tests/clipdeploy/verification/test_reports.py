"""Reports on real verifications: correct, broken, not judged; hostile names; self-contained.

Covers: clipdeploy/verification/reports/contents.py, clipdeploy/verification/reports/drawings.py,
    clipdeploy/verification/reports/evidence.py, clipdeploy/verification/reports/pages.py,
    clipdeploy/verification/reports/provenance.py, clipdeploy/verification/reports/thumbnails.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pages import Page, headings_of, read_page

from clipdeploy.core.errors import FileError, UsageError
from clipdeploy.core.passport import to_json
from clipdeploy.core.printable import is_one_line
from clipdeploy.imaging import ImageFolder, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.verification.baseline import Expected
from clipdeploy.verification.records import Answer, ImageId, ImageRecord, Outcome
from clipdeploy.verification.reports import Evidence, check_report_paths, write_report
from clipdeploy.verification.reports.contents import contents_of
from clipdeploy.verification.reports.evidence import (
    PERCENTILES,
    disagreeing_of,
    spread_of,
    worst_images,
)
from clipdeploy.verification.results import BatchResult, Results
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import run_verification
from clipdeploy.workspace.folder import Workspace
from exporters.headers import read_passport

CLASSES = tuple("0123456789")
SECTIONS = [
    "Artifacts",
    "Problems with the images",
    "Logits and answers",
    "Images with the largest errors",
    "Provenance",
]
EVIL = '"><script>alert(1)<|*_$x_$.png'


@dataclass(frozen=True)
class Case:
    """A run, and where a report on it goes."""

    results: Results
    images: ImageFolder | None
    folder: Path
    max_drop: float = 10.0
    expected: Expected = field(default_factory=Expected)

    def write(self, suffix: str) -> str:
        path = self.folder / f"report{suffix}"
        result = judge_results(self.results, self.max_drop, self.expected)
        write_report(path, result, Evidence(self.results, self.images, "the images: they are gone"))
        return path.read_text(encoding="utf-8")

    def page(self) -> Page:
        return read_page(self.write(".html"))


@pytest.fixture(scope="module")
def digits() -> ImageFolder:
    return select(open_images(cards.demo_file("test.zip"), CLASSES), 60, seed=0)


def graph_with_bias(source: Path, path: Path, values: Callable[[], np.ndarray]) -> Target:
    proto = onnx.load(source)
    (place,) = [i for i, t in enumerate(proto.graph.initializer) if t.name.startswith("head.bias")]
    tensor = proto.graph.initializer[place]
    bias = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values().astype(bias.dtype), tensor.name))
    onnx.save(proto, path)
    return Target(path, "graph", read_passport(path))


@pytest.fixture(scope="module")
def run(
    demo_workspace: Workspace,
    demo_model: LoadedModel,
    digits: ImageFolder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """FP32, INT8, one that prefers wrong classes, and one whose logits are NaN."""
    folder = tmp_path_factory.mktemp("graphs")
    fp32 = demo_workspace.graph(cards.DEMO, "fp32")
    int8 = demo_workspace.graph(cards.DEMO, "int8")
    targets = [Target(path, "graph", read_passport(path)) for path in (fp32, int8)]
    bias = np.roll(np.linspace(0, 40, 10), 3)
    targets.append(graph_with_bias(fp32, folder / "wrong.onnx", lambda: bias))
    targets.append(graph_with_bias(fp32, folder / "nan.onnx", lambda: np.full(10, np.nan)))
    return run_verification(demo_model, targets[0].passport, targets, digits)


def only(results: Results, *lanes: int) -> Results:
    """The results of these artifacts alone."""
    entries = tuple(results.run_key.artifacts[lane] for lane in lanes)
    batches = tuple(
        BatchResult(
            batch.batch,
            tuple(
                msgspec.structs.replace(r, outcomes=tuple(r.outcomes[lane] for lane in lanes))
                for r in batch.records
            ),
            repeats=tuple(batch.repeats[lane] for lane in lanes),
        )
        for batch in results.batches
    )
    return replace(results, run_key=replace(results.run_key, artifacts=entries), batches=batches)


def renamed(results: Results, old: str, new: str) -> Results:
    text = to_json(results).replace(json.dumps(old).encode(), json.dumps(new).encode())
    return msgspec.json.decode(text, type=Results)


@pytest.fixture
def sound(run: Results, digits: ImageFolder, tmp_path: Path) -> Case:
    return Case(only(run, 0, 1), digits, tmp_path)


@pytest.fixture
def ruined(run: Results, digits: ImageFolder, tmp_path: Path) -> Case:
    return Case(run, digits, tmp_path)


def test_the_verdict_comes_first_and_the_sections_follow(sound: Case) -> None:
    page = sound.page()
    assert page.text.startswith("EQUIVALENT 2 graphs lose no more than 10.00 points of top-1")
    assert page.sections == SECTIONS
    assert page.text.index("baseline unconfirmed") < page.text.index("Artifacts")
    for word in ("fp32 graph", "int8 graph", "ONNX Runtime (CPU)", "None.", "SHA-256"):
        assert word in page.text
    assert len(page.images) == 6


def test_markdown_has_the_same_texts_in_the_same_order(ruined: Case) -> None:
    page, markdown = ruined.page(), ruined.write(".md")
    assert markdown.startswith("# REGRESSED\n")
    order = [part for part in headings_of(markdown) if part in page.sections]
    assert order == [part for part in page.sections if part != "Logits and answers"]
    result = judge_results(ruined.results, ruined.max_drop)
    contents = contents_of(ruined.results, result)
    said = [contents.heading, *contents.baseline, *(line.reason for line in contents.lines)]
    said += [value for pair in contents.provenance for value in pair]
    said += [image.name for image in contents.worst]
    plain = markdown.replace("\\", "")
    for text in said:
        assert text in page.text
        assert text in plain
    # Every row of a table has as many cells as its header.
    for block in markdown.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_json_is_what_the_terminal_gets(sound: Case) -> None:
    result = judge_results(sound.results, sound.max_drop)
    assert sound.write(".json").encode() == to_json(result) + b"\n"


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_the_same_results_make_the_same_bytes(suffix: str, ruined: Case) -> None:
    assert ruined.write(suffix) == ruined.write(suffix)
    assert ruined.write(suffix) != replace(ruined, max_drop=11.0).write(suffix)


def test_a_regressed_result_shows_who_answers_what(ruined: Case) -> None:
    page = ruined.page()
    assert page.text.startswith("REGRESSED ")
    assert "NaN or infinite logits for 60 images, which are left out" in page.text
    assert "✗" in page.text
    assert len(page.images) == 24
    contents = contents_of(ruined.results, judge_results(ruined.results, ruined.max_drop))
    # Three FP32 graphs are distinguished by their file names.
    names = ["fp32.onnx", "int8 graph", "wrong.onnx", "nan.onnx"]
    assert [line.artifact for line in contents.lines] == ["PyTorch", *names]
    assert list(contents.spreads) == names
    # An artifact with NaN shows no metrics that could look valid.
    assert [value for value, _ in contents.lines[-1].cells[-3:]] == ["NaN/inf"] * 3
    lost = {name: found.lost for name, found in contents.disagreeing.items()}
    _, sane, *bad = lost
    assert lost[sane] == 0
    result = judge_results(ruined.results, ruined.max_drop)
    for row, found in zip(result.rows, contents.disagreeing.values(), strict=True):
        assert row.disagreements == found.images
    assert lost[bad[0]] > 20
    # A NaN logit is not an answer, not even at the label's position.
    nan = [answer for image in contents.worst for answer in image.answers if answer.who == bad[1]]
    assert {(answer.text, answer.right) for answer in nan} == {("NaN or infinite", False)}


def test_a_missed_baseline_is_no_verdict(sound: Case) -> None:
    page = replace(sound, expected=Expected.parse("50")).page()
    assert page.text.startswith("NOT JUDGED PyTorch's top-1 is")
    assert "baseline missed" in page.text
    assert "EQUIVALENT" not in page.text
    assert "not judged" in page.text


def test_random_weights_and_images_without_labels(sound: Case) -> None:
    run_key = replace(sound.results.run_key, random_weights=True)
    page = replace(sound, results=replace(sound.results, run_key=run_key)).page()
    assert page.text.startswith("NOT JUDGED random weights have no accuracy")
    assert "✓" not in page.text
    assert "label" not in " ".join(page.sections)
    bare = replace(sound.results.run_key, labelled=False)
    batches = tuple(
        replace(b, records=tuple(unlabelled(r) for r in b.records)) for b in sound.results.batches
    )
    results = replace(sound.results, run_key=bare, batches=batches)
    page = replace(sound, results=results).page()
    assert page.text.startswith("NOT PROVEN fp32 graph not judged")
    assert "✓" not in page.text
    assert "label:" not in page.text
    assert "drop of top-1" not in page.text


def unlabelled(record: ImageRecord) -> ImageRecord:
    bare = Answer(record.reference.top, None)
    outcomes = tuple(
        Outcome(Answer(o.answer.top, None), o.max_abs, o.sum_abs, o.noise, o.cosine)
        for o in record.outcomes
    )
    return msgspec.structs.replace(record, label=None, reference=bare, outcomes=outcomes)


def test_nothing_that_ran_is_still_a_page(sound: Case) -> None:
    entries = tuple(
        replace(a, runner="", why_not="no GPU") for a in sound.results.run_key.artifacts
    )
    page = replace(
        sound,
        results=replace(
            only(sound.results), run_key=replace(sound.results.run_key, artifacts=entries)
        ),
    ).page()
    assert page.text.startswith("NOT PROVEN fp32 graph not executed")
    assert "no GPU" in page.text
    assert page.sections == ["Artifacts", "Problems with the images", "Provenance"]


def test_names_are_text_and_nothing_else(ruined: Case) -> None:
    worst = contents_of(ruined.results, judge_results(ruined.results, 10.0)).worst[0].name
    results = renamed(ruined.results, worst, f"0/{EVIL}")
    artifacts = results.run_key.artifacts
    evil = replace(artifacts[2], artifact=f"/tmp/{EVIL}", vouched=False)
    problems = (f"{EVIL} is odd",)
    run_key = replace(
        results.run_key, artifacts=(*artifacts[:2], evil, artifacts[3]), problems=problems
    )
    hostile = replace(ruined, results=replace(results, run_key=run_key, data=EVIL))
    page = hostile.page()
    assert page.tags == ruined.page().tags
    assert not {"script", "iframe", "object", "link"} & page.tags
    assert f"0/{EVIL}" in page.text
    # As artifact in the table, both tables of metrics, reason, provenance; as problem, as data.
    assert page.text.count(EVIL) >= 8
    assert f"Not shown: 0/{EVIL} no longer exists" in page.text
    markdown = hostile.write(".md")
    assert "<script>" not in markdown.replace("\\<script\\>", "")
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert any(EVIL in line.replace("\\", "") for line in lines)


def test_markdown_does_not_act_on_a_terminal(ruined: Case) -> None:
    odd = replace(ruined, results=replace(ruined.results, data="a\x1b[2J\u202eb"))
    markdown = odd.write(".md")
    assert all(map(is_one_line, markdown.split("\n")))
    assert r"a\x1b[2J\u202eb" in markdown.replace(r"\\", "\\").replace(r"\[", "[")


def test_the_page_refers_to_nothing_outside(ruined: Case) -> None:
    page = ruined.page()
    assert page.references
    assert all(r.startswith(("data:image/jpeg;base64,", "#")) for r in page.references)
    assert "default-src 'none'" in page.policy
    # The plots share no identifier, and refer only to existing ones.
    assert len(set(page.ids)) == len(page.ids)
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)
    outside = read_page('<img src="http://a/b.png"><p style="background: url(//c/d)">')
    assert outside.references == ["http://a/b.png", "//c/d"]


def test_images_that_are_gone_or_changed_are_named(sound: Case, tmp_path: Path) -> None:
    page = replace(sound, images=None).page()
    assert page.images == []
    assert "Not shown: the images: they are gone" in page.text
    shown = contents_of(sound.results, judge_results(sound.results, 10.0)).worst
    folder = tmp_path / "images"
    reader = sound.images.reader() if sound.images else None
    assert reader is not None
    for place, image in enumerate(shown[:3]):
        path = folder / image.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(image.name) if place else b"another image")
    reader.close()
    page = replace(sound, images=open_images(folder, CLASSES)).page()
    assert len(page.images) == 2
    assert f"{shown[0].name} has changed since the verification" in page.text
    assert f"{shown[5].name} no longer exists" in page.text


def test_wnids_are_shown_with_their_words(sound: Case) -> None:
    names = tuple(wnid for wnid, _ in cards.imagenet_classes()[:10])
    result = replace(judge_results(sound.results, 10.0), class_names=names)
    labels = {image.label for image in contents_of(sound.results, result).worst}
    assert labels <= {f"{word.split(',')[0]} ({wnid})" for wnid, word in cards.imagenet_classes()}
    assert not labels & set(names)


def record(name: str, noise: float | None, top: int = 1, label: int = 1) -> ImageRecord:
    off = None if noise is None else math.sqrt(noise)
    outcome = Outcome(Answer((top,), 0 if top == label else 1), off, off, noise, 1.0)
    answer = Answer((1,), 0 if label == 1 else 1)
    return ImageRecord(ImageId(name, "", "", b""), label, "", 100.0, answer, (outcome,))


def test_the_spread_is_that_of_numpy() -> None:
    noises = np.random.default_rng(0).uniform(0.1, 10, 137)
    spread = spread_of([record(str(i), float(n)) for i, n in enumerate(noises)], 0)
    values = 10 * np.log10(100 / noises)
    wanted = np.percentile(values, PERCENTILES, method="inverted_cdf")
    # The same images: nothing is interpolated, only the logarithms are of another library.
    np.testing.assert_allclose(spread.percentiles, wanted, rtol=1e-12)
    odd = spread_of([record("a", 0.0), record("b", None), record("c", 1.0)], 0)
    assert (odd.broken, odd.equal) == (1, 1)
    assert odd.percentiles[0] == 20
    assert odd.percentiles[-1] == math.inf


def test_who_is_right_where_answers_differ() -> None:
    records = [
        record("same", 0.1),
        record("lost", 1.0, top=2, label=1),
        record("gained", 4.0, top=2, label=2),
        record("neither", 2.0, top=2, label=3),
        record("nan", None, top=0),
    ]
    found = disagreeing_of(records, 0)
    assert (found.images, found.lost, found.gained, found.neither) == (4, 2, 1, 1)
    names = [each.name for each in worst_images(records, most=3, least=0)]
    assert names == ["nan", "gained", "neither"]
    names = [each.name for each in worst_images(records, most=24, least=6)]
    assert names == ["nan", "gained", "neither", "lost", "same"]


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"report\.pdf is not a report"):
        check_report_paths([tmp_path / "a.html", tmp_path / "report.pdf"])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write"):
        check_report_paths([tmp_path / "file" / "a.html"])
    check_report_paths([tmp_path / name for name in ("a.HTML", "b.md", "c.json")])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_pages_are_read_as_they_are() -> None:
    assert issubclass(Page, HTMLParser)
    page = read_page("<h2>One</h2><p>two &lt;b&gt;</p><svg><text>three</text></svg>")
    assert page.sections == ["One"]
    assert page.text == "One two <b> three"
