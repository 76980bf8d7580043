from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.observers import ChannelObserver, ChannelStatistics
from calibration.table import (
    MOST_CROPS,
    CalibrationCrop,
    CalibrationImageRecord,
    CalibrationTable,
    Finding,
    choose_crops,
    load_table,
    merge_tables,
    pack,
    save_table,
    unpack,
)
from clipdeploy.core.errors import ArtifactError, CalibrationError, FileError
from clipdeploy.core.passport import CLIP_MEAN, CLIP_STD, Preprocess
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace


def _statistics(seed: int = 0, channels: int = 5) -> ChannelStatistics:
    rng = np.random.default_rng(seed)
    observer = ChannelObserver("x", channels)
    for _ in range(4):
        rows = rng.standard_normal((9, channels)).astype(np.float32)
        observer.collect(rows.min(axis=0), rows.max(axis=0), rows)
    return observer.compute()


def _table() -> CalibrationTable:
    return CalibrationTable(
        model="tiny",
        weights="random:0",
        source_graph="ab" * 32,
        preprocess=Preprocess(16, CLIP_MEAN, CLIP_STD),
        images=(
            CalibrationImageRecord("a/été.png", "cd" * 32, "ab" * 16, bytes(range(64))),
            CalibrationImageRecord("b.png", "ef" * 32),
        ),
        statistics={f"blocks.{i}.mlp.fc1": pack(_statistics(i)) for i in range(3)},
    )


def _equal(one: ChannelStatistics, other: ChannelStatistics) -> bool:
    return one.rows == other.rows and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in (
            (one.minimum, other.minimum),
            (one.maximum, other.maximum),
            (one.counts, other.counts),
            (one.total, other.total),
        )
    )


def _write(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.json"
    save_table(_table(), path)
    return path


def test_statistics_survive_packing_bit_for_bit() -> None:
    statistics = _statistics()
    packed = pack(statistics)
    assert _equal(unpack(packed), statistics)
    assert pack(unpack(packed)) == packed
    assert packed.amax == float(statistics.amax.max())


def test_table_survives_the_file_bit_for_bit(saved: Path) -> None:
    table = load_table(saved)
    assert replace(table, seal="") == _table()
    assert [astuple(image) for image in table.images] == [astuple(i) for i in _table().images]
    assert [image.decoded for image in table.images] == [True, False]
    for i in range(3):
        assert _equal(table.of(f"blocks.{i}.mlp.fc1"), _statistics(i))


def test_saving_again_writes_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.json"
    assert save_table(load_table(saved), again) == load_table(saved)
    assert again.read_bytes() == saved.read_bytes()


def test_images_are_the_same_by_name_and_bytes_whatever_is_known_of_their_pixels() -> None:
    known, unknown = _table().images[0], CalibrationImageRecord("a/été.png", "cd" * 32)
    assert known == unknown
    assert len({known, unknown}) == 1
    assert known != replace(known, sha256="00" * 32)


def _without_findings(raw: dict[str, Any]) -> None:
    """Remove what schema 5 added."""
    del raw["findings"]
    for image in raw["images"]:
        del image["edge"]


def _as_schema_2(path: Path) -> dict[str, Any]:
    """A table in the schema before images had pixels, sealed."""
    raw: dict[str, Any] = json.loads(path.read_bytes())
    raw["schema"], raw["seal"] = 2, ""
    del raw["crops"]
    _without_findings(raw)
    for image in raw["images"]:
        del image["pixels"], image["thumbnail"]
    compact = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    raw["seal"] = hashlib.sha256(compact.encode()).hexdigest()
    return raw


def test_an_old_table_is_read_and_knows_no_pixels(saved: Path, tmp_path: Path) -> None:
    raw = _as_schema_2(saved)
    old = load_table(_write(tmp_path / "old.json", raw))
    assert old.schema == 2
    assert old.images == _table().images
    assert not any(image.decoded for image in old.images)
    assert save_table(old, tmp_path / "again.json").seal == raw["seal"]
    assert load_table(tmp_path / "again.json") == old


def test_a_table_without_findings_is_read_and_not_monitored(saved: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = json.loads(saved.read_bytes())
    raw["schema"], raw["seal"] = 4, ""
    _without_findings(raw)
    compact = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    raw["seal"] = hashlib.sha256(compact.encode()).hexdigest()
    old = load_table(_write(tmp_path / "old.json", raw))
    assert (old.monitored, old.findings) == (False, ())
    assert save_table(old, tmp_path / "again.json").seal == raw["seal"]
    raw["findings"] = [{"kind": "few", "sentence": "only 3 images"}]
    with pytest.raises(ArtifactError, match="does not match its seal"):
        load_table(_write(tmp_path / "edited.json", raw))


def test_findings_are_saved_and_a_finding_of_two_lines_is_refused(tmp_path: Path) -> None:
    table = replace(_table(), findings=(Finding("few", "only 3 images"),))
    save_table(table, tmp_path / "table.json")
    assert load_table(tmp_path / "table.json").findings == table.findings
    save_table(replace(table, findings=(Finding("few", "only\n3"),)), tmp_path / "table.json")
    with pytest.raises(ArtifactError, match="one line of printable text"):
        load_table(tmp_path / "table.json")


def test_a_table_without_crops_is_read(saved: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = json.loads(saved.read_bytes())
    raw["schema"], raw["seal"] = 3, ""
    del raw["crops"]
    _without_findings(raw)
    compact = json.dumps(raw, separators=(",", ":"), ensure_ascii=False)
    raw["seal"] = hashlib.sha256(compact.encode()).hexdigest()
    old = load_table(_write(tmp_path / "old.json", raw))
    assert (old.samples(), old.images[0].decoded) == (None, True)
    raw["crops"] = [{"name": "x.png", "sha256": "ab" * 32, "pixels": "AAAA"}]
    with pytest.raises(ArtifactError, match="seal"):
        load_table(_write(tmp_path / "old.json", raw))


def _crops(count: int) -> list[CalibrationCrop]:
    rng = np.random.default_rng(0)
    return [
        CalibrationCrop.of(
            f"{number}.png",
            hashlib.sha256(bytes([number])).hexdigest(),
            rng.integers(0, 256, (16, 16, 3), np.uint8),
        )
        for number in range(count)
    ]


def test_the_same_crops_are_chosen_in_any_order_and_sharding() -> None:
    crops = _crops(90)
    chosen = choose_crops(crops)
    assert len(chosen) == MOST_CROPS
    assert choose_crops(crops[::-1]) == chosen
    assert choose_crops((*choose_crops(crops[::2]), *choose_crops(crops[1::2]))) == chosen
    # A copy of a file does not count as another picture.
    copies = [replace(crop, name=f"copy/{crop.name}") for crop in crops]
    assert choose_crops([*copies, *crops]) == chosen


def test_crops_survive_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    crops = tuple(CalibrationCrop.of(str(i), f"{i}0" * 32, pixels[i]) for i in range(2))
    save_table(replace(_table(), crops=crops), tmp_path / "table.json")
    samples = load_table(tmp_path / "table.json").samples()
    assert samples is not None
    assert np.array_equal(samples.crops, pixels)
    damaged = replace(_table(), crops=(replace(crops[0], pixels=crops[0].pixels[:-9]),))
    with pytest.raises(CalibrationError, match="images are damaged"):
        damaged.samples()


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["images"][0].update(pixels="00" * 16),
        lambda raw: raw["images"][1].update(thumbnail="AAAA"),
        lambda raw: raw["images"][1].update(sha256="00" * 32),
        lambda raw: raw.update(schema=3),
        lambda raw: raw.update(schema=1),
    ],
)
def test_an_old_table_that_was_edited_is_refused(
    saved: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    raw = _as_schema_2(saved)
    edit(raw)
    with pytest.raises(ArtifactError, match="does not match its seal"):
        load_table(_write(tmp_path / "edited.json", raw))


def test_an_old_shard_and_a_new_one_merge_to_a_table_that_survives_the_file(tmp_path: Path) -> None:
    new, old = _shard(1, 2), replace(_shard(2, 2), schema=2)
    known = tuple(replace(image, pixels="ab" * 16, thumbnail=bytes(64)) for image in new.images)
    for parts in ([replace(new, images=known), old], [old, replace(new, images=known)]):
        save_table(merge_tables(parts), tmp_path / "merged.json")
        merged = load_table(tmp_path / "merged.json")
        assert [image.decoded for image in merged.images] == [True, True, False, False]


def test_demo_table_is_whole(demo_workspace: Workspace) -> None:
    table = load_table(demo_workspace.calibration(cards.DEMO))
    assert len(table.images) == 200
    assert len({image.pixels for image in table.images}) == 200
    assert {len(image.thumbnail) for image in table.images} == {64}
    assert [record.name for record in table.images] == sorted(r.name for r in table.images)
    assert len(table.statistics) == 31


def _edit_extremes(raw: dict[str, Any]) -> None:
    other = json.loads(json.dumps(raw["statistics"]["blocks.1.mlp.fc1"]["extremes"]))
    raw["statistics"]["blocks.0.mlp.fc1"]["extremes"] = other


def _edit_amax(raw: dict[str, Any]) -> None:
    raw["statistics"]["blocks.0.mlp.fc1"]["amax"] *= 1.01


def _edit_hash(raw: dict[str, Any]) -> None:
    raw["images"][0]["sha256"] = "00" * 32


def _edit_pixels(raw: dict[str, Any]) -> None:
    raw["images"][0]["pixels"] = "00" * 16


def _edit_thumbnail(raw: dict[str, Any]) -> None:
    raw["images"][0]["thumbnail"] = ""


def _edit_mean(raw: dict[str, Any]) -> None:
    raw["preprocess"]["mean"][0] = float(np.nextafter(raw["preprocess"]["mean"][0], 1))


def _edit_seal(raw: dict[str, Any]) -> None:
    raw["seal"] = "00" * 32


def _drop_seal(raw: dict[str, Any]) -> None:
    del raw["seal"]


def _drop_linear(raw: dict[str, Any]) -> None:
    del raw["statistics"]["blocks.2.mlp.fc1"]


def _drop_image(raw: dict[str, Any]) -> None:
    raw["images"].pop()


def _edit_model(raw: dict[str, Any]) -> None:
    raw["model"] = "clip-vit-base-p16"


@pytest.mark.parametrize(
    "edit",
    [
        _edit_extremes,
        _edit_amax,
        _edit_hash,
        _edit_pixels,
        _edit_thumbnail,
        _edit_mean,
        _edit_seal,
        _edit_model,
        _drop_seal,
        _drop_linear,
        _drop_image,
    ],
)
def test_table_edited_by_hand_is_refused(
    saved: Path, edit: Callable[[dict[str, Any]], None]
) -> None:
    raw = json.loads(saved.read_text(encoding="utf-8"))
    assert load_table(_write(saved, raw))
    edit(raw)
    with pytest.raises(ArtifactError, match="does not match its seal") as found:
        load_table(_write(saved, raw))
    assert found.value.hint == "calibrate again"


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95, 0.999])
def test_truncated_table_is_refused(saved: Path, fraction: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ArtifactError, match=r"calibration\.json cannot be read"):
        load_table(saved)


def test_newer_table_is_refused(saved: Path) -> None:
    raw = json.loads(saved.read_text(encoding="utf-8"))
    raw["schema"] = 6
    with pytest.raises(ArtifactError, match="written by a newer clipdeploy"):
        load_table(_write(saved, raw))


def test_passport_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_table(_write(tmp_path / "x.json", {"kind": "engine", "schema": 1}))


def test_missing_table_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*absent\.json"):
        load_table(tmp_path / "absent.json")


def test_unknown_linear_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"has no statistics of blocks\.9\.mlp\.fc1"):
        _table().of("blocks.9.mlp.fc1")


@pytest.mark.parametrize(
    "change",
    [
        {"extremes": b"not zlib"},
        {"counts": pack(_statistics()).total},
        {"total": pack(_statistics()).total[:-6]},
        {"channels": 4},
    ],
)
def test_damaged_statistics_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="statistics are damaged"):
        unpack(replace(pack(_statistics()), **change))


def _shard(number: int, count: int = 3) -> CalibrationTable:
    records = tuple(CalibrationImageRecord(f"{number}{i}.png", f"{number}{i}" * 32) for i in (0, 1))
    statistics = {f"blocks.{i}.mlp.fc1": pack(_statistics(10 * number + i)) for i in range(2)}
    return replace(_table(), images=records, statistics=statistics, shard=(number, count))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2), (2, 3, 1)])
def test_shards_merge_in_any_order(order: tuple[int, ...]) -> None:
    merged = merge_tables([_shard(number) for number in order])
    assert merged == merge_tables([_shard(1), _shard(2), _shard(3)])
    assert merged.shard is None
    assert [r.name for r in merged.images] == [f"{n}{i}.png" for n in (1, 2, 3) for i in (0, 1)]
    expected = _statistics(10).merge(_statistics(20)).merge(_statistics(30))
    assert _equal(merged.of("blocks.0.mlp.fc1"), expected)
    assert not _equal(merged.of("blocks.0.mlp.fc1"), _statistics(10).merge(_statistics(20)))


def test_shard_survives_the_file(tmp_path: Path) -> None:
    save_table(_shard(2), tmp_path / "x.json")
    assert load_table(tmp_path / "x.json").shard == (2, 3)


@pytest.mark.parametrize("numbers", [(1, 2), (2, 3), (1, 2, 2), (1, 1, 2, 3), (1,), (1, 2, 4)])
def test_missing_and_double_shards_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match=r"of 3, but 1 to 3 are needed, each once"):
        merge_tables([_shard(number) for number in numbers])


def test_no_shard_and_a_whole_table_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no shard to merge"):
        merge_tables([])
    with pytest.raises(CalibrationError, match="the calibration is not a shard"):
        merge_tables([_table()])
    with pytest.raises(CalibrationError, match="are needed, each once"):
        merge_tables([_shard(1), _table(), _shard(2), _shard(3)])


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"weights": "random:1"},
        {"source_graph": "cd" * 32},
        {"preprocess": Preprocess(32, CLIP_MEAN, CLIP_STD)},
        {"shard": (2, 4)},
        {"statistics": {}},
    ],
)
def test_shards_of_different_runs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="are from different runs"):
        merge_tables([_shard(1), replace(_shard(2), **change), _shard(3)])


def test_shards_that_share_an_image_are_refused() -> None:
    with pytest.raises(CalibrationError, match="share images"):
        merge_tables([_shard(1), replace(_shard(2), images=_shard(1).images), _shard(3)])


def test_no_more_is_unpacked_than_the_channels_hold() -> None:
    bomb = zlib.compress(bytes(1 << 26))
    packed = replace(pack(_statistics()), counts=bomb)
    with pytest.raises(CalibrationError, match="are damaged: the data do not have shape"):
        unpack(packed)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "../../x"),
        ("source_graph", "../x"),
        ("weights", "a\nb"),
        ("shard", (5, 2)),
        ("preprocess", Preprocess(10**9, (0, 0, 0), (1, 1, 1))),
        ("statistics", {"a": replace(pack(_statistics()), channels=10**15)}),
    ],
)
def test_a_sealed_table_with_values_that_cannot_be(
    field: str, value: object, tmp_path: Path
) -> None:
    table = replace(_table(), **{field: value})  # type: ignore[arg-type]
    path = tmp_path / "calibration.json"
    save_table(table, path)
    with pytest.raises(ArtifactError, match=f"is invalid: {field}"):
        load_table(path)
