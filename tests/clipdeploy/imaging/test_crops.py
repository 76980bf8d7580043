"""The crop cache: what it finds again, and what it must not return.

Covers: clipdeploy/imaging/crop_shards.py, clipdeploy/imaging/decoding.py,
    clipdeploy/imaging/keys.py.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pixel_changes import PIXEL_CHANGES, change_pixels

from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import (
    Crop,
    ImageFolder,
    Reading,
    archives,
    crops,
    decoding,
    iter_crops,
    open_images,
)
from clipdeploy.imaging.crop_shards import ROW_BYTES
from clipdeploy.imaging.crops import CropCache, pixels_key
from clipdeploy.imaging.fingerprints import fingerprint
from clipdeploy.models import cards

SPEC = cards.find(cards.DEMO).preprocess(Recipe())
CROP_BYTES = 32 * 32 * 3
COUNT = 12


SETTLED_NS = crops._SETTLED_NS


@pytest.fixture(autouse=True)
def _files_are_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trust the stamps of new files; otherwise each test would have to wait for two seconds."""
    monkeypatch.setattr(crops, "_SETTLED_NS", 0)


def write_images(root: Path, first: int = 0) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + COUNT):
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{seed:04d}.jpg", quality=90)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.fixture
def cache(tmp_path: Path) -> CropCache:
    return CropCache(tmp_path / "crops")


def run(
    images: Path | ImageFolder, cache: CropCache | None, workers: int = 0
) -> tuple[list[Crop], Reading]:
    reading = Reading()
    opened = open_images(images) if isinstance(images, Path) else images
    return list(iter_crops(opened, SPEC, workers=workers, cache=cache, reading=reading)), reading


def same(one: list[Crop], two: list[Crop]) -> bool:
    return len(one) == len(two) and all(
        (a.entry, a.sha256, a.fingerprint) == (b.entry, b.sha256, b.fingerprint)
        and np.array_equal(a.pixels, b.pixels)
        for a, b in zip(one, two, strict=True)
    )


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail the test if any image is opened."""

    def trip(*_: object) -> bytes:
        raise AssertionError("an image was opened")

    with monkeypatch.context() as patch:
        patch.setattr(archives.Reader, "read", trip)
        yield


def pack(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_a_second_run_opens_no_image(
    folder: Path,
    cache: CropCache,
    workers: int,
    packed: bool,
    request: pytest.FixtureRequest,
) -> None:
    images = pack(folder) if packed else folder
    plain, _ = run(images, None)
    first, reading = run(images, cache, workers)
    assert reading.cached == 0
    request.getfixturevalue("nothing_is_read")
    second, reading = run(images, cache, workers)
    assert reading.cached == COUNT
    assert same(plain, first)
    assert same(plain, second)


def test_the_fixture_detects_an_opened_image(
    folder: Path, cache: CropCache, nothing_is_read: None
) -> None:
    with pytest.raises(AssertionError, match="an image was opened"):
        run(folder, cache)


def test_moved_images_are_found_by_their_content(
    folder: Path, cache: CropCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = run(folder, cache)
    size = cache.size()
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.setattr(decoding, "crop_file", None)  # whoever decodes fails
    second, reading = run(moved, cache)
    assert reading.cached == 0
    assert same(first, second)
    # Only the new names were added: the pixels are stored once.
    assert cache.size() == size + COUNT * ROW_BYTES
    _, reading = run(moved, cache)
    assert reading.cached == COUNT


def test_worker_processes_find_crops_by_content_too(folder: Path, cache: CropCache) -> None:
    first, _ = run(folder, cache)
    moved = folder.rename(folder.with_name("moved"))
    second, _ = run(moved, cache, workers=1)
    assert same(first, second)
    assert cache.size() < 2 * COUNT * CROP_BYTES


def test_a_file_with_other_bytes_is_decoded_again(folder: Path, cache: CropCache) -> None:
    """Even with equal size and mtime, because the ctime cannot be set."""
    run(folder, cache)
    victim, other = folder / "0003.jpg", folder / "0005.jpg"
    state = victim.stat()
    data = other.read_bytes()[: state.st_size].ljust(state.st_size, b"\0")
    victim.write_bytes(data)
    os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (victim.stat().st_size, victim.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    cached, reading = run(folder, cache)
    assert reading.cached == COUNT - 1
    assert same(cached, run(folder, None)[0])


def test_the_stamp_of_a_file_changed_just_now_is_not_trusted(
    folder: Path, cache: CropCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SETTLED_NS == 2_000_000_000
    monkeypatch.setattr(crops, "_SETTLED_NS", 10**15)  # however slow this machine is
    first, _ = run(folder, cache)
    second, reading = run(folder, cache)
    assert reading.cached == 0
    assert same(first, second)


def test_each_preprocessing_has_its_own_crops(folder: Path, cache: CropCache) -> None:
    run(folder, cache)
    with_other_means = replace(SPEC, mean=(0.0, 0.0, 0.0))
    assert len(cache.open(with_other_means)) == COUNT  # they do not change a crop
    for other in (
        replace(SPEC, size=64),
        replace(SPEC, crop_pct=0.9),
        replace(SPEC, crop_mode="squash"),
        replace(SPEC, exif_orientation=False),
        replace(SPEC, interpolation="bilinear"),
    ):
        assert len(cache.open(other)) == 0


@pytest.mark.parametrize("changed", PIXEL_CHANGES)
def test_crops_of_another_decoder_are_not_used(
    folder: Path,
    cache: CropCache,
    changed: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    _, reading = run(folder, cache)
    key = pixels_key(SPEC)
    change_pixels(changed, monkeypatch, tmp_path)
    assert pixels_key(SPEC) != key
    assert run(folder, cache)[1].cached == reading.cached == 0
    monkeypatch.undo()
    monkeypatch.setattr(crops, "_SETTLED_NS", 0)
    # The old crops are used again once the change is undone.
    assert pixels_key(SPEC) == key
    assert run(folder, cache)[1].cached == COUNT


def test_every_module_between_bytes_and_crop_is_in_the_key() -> None:
    """Every module that a worker loads is in the key, or is listed here as irrelevant to pixels."""
    listed = "import sys, clipdeploy.imaging.loader; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", listed], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in loaded if name.startswith("clipdeploy.imaging.")}
    keeping = {"crop_shards", "crops", "keys", "stream", "survey"}
    listing = {"images", "layouts", "listing", "scan"}
    listing |= {"classes", "devkit", "folders", "formats", "label_files", "label_rows", "labels"}
    assert ours - {f"clipdeploy.imaging.{name}" for name in keeping | listing} == {
        name for name in PIXEL_CHANGES if name.startswith("clipdeploy.")
    }


def shard(cache: CropCache) -> Path:
    (pixels,) = cache.shards()
    return pixels


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_damaged_crop_is_decoded_and_stored_again(folder: Path, cache: CropCache) -> None:
    plain, _ = run(folder, cache)
    flip(shard(cache), 4 * CROP_BYTES + 1000)
    second, reading = run(folder, cache)
    assert reading.cached == COUNT - 1
    assert same(plain, second)
    third, reading = run(folder, cache)
    assert reading.cached == COUNT
    assert same(plain, third)


@pytest.mark.parametrize("offset", [0, 20, 50, 70, 130, 134, 138])
def test_a_damaged_row_is_ignored(folder: Path, cache: CropCache, offset: int) -> None:
    plain, _ = run(folder, cache)
    flip(shard(cache).with_suffix(".rows"), 7 * ROW_BYTES + offset)
    second, reading = run(folder, cache)
    assert reading.cached == COUNT - 1
    assert same(plain, second)


@pytest.mark.parametrize("suffix", [".items", ".rows"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.49, 0.5, 0.999])
def test_a_truncated_shard_has_fewer_crops_and_no_wrong_ones(
    folder: Path, cache: CropCache, suffix: str, keep: float
) -> None:
    plain, _ = run(folder, cache)
    path = shard(cache).with_suffix(suffix)
    os.truncate(path, int(path.stat().st_size * keep))
    second, reading = run(folder, cache)
    assert reading.cached == int(COUNT * keep)
    assert same(plain, second)


@pytest.mark.parametrize("read_bytes", [CROP_BYTES, 4 * CROP_BYTES, 1 << 20])
@pytest.mark.parametrize("workers", [0, 2])
def test_crops_read_together_are_correct_in_any_order(
    folder: Path,
    cache: CropCache,
    read_bytes: int,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stored in two shards, some damaged or missing, read in other orders."""
    monkeypatch.setattr(crops, "_READ_BYTES", read_bytes)
    images = open_images(folder)
    run(ImageFolder(folder, images.entries[1:7]), cache)
    run(ImageFolder(folder, images.entries[7:]), cache)
    flip(cache.shards()[0], 2 * CROP_BYTES + 1000)
    kept = CropCache(cache.folder, cache.limit_bytes)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(COUNT)
        mixed = ImageFolder(folder, tuple(images.entries[at] for at in order))
        wanted, _ = run(mixed, None)
        got, reading = run(mixed, kept, workers)
        assert same(wanted, got)
        # The first of these runs decodes and stores the missing and damaged crops.
        assert reading.cached == (COUNT - 2 if seed == 0 else COUNT)


def test_rows_of_another_shard_give_no_wrong_pixels(folder: Path, cache: CropCache) -> None:
    plain, _ = run(folder, cache)
    pixels = shard(cache)
    data = pixels.read_bytes()
    pixels.write_bytes(data[CROP_BYTES:] + data[:CROP_BYTES])
    second, reading = run(folder, cache)
    assert reading.cached == 0
    assert same(plain, second)


def test_the_least_recently_used_shards_are_removed_first(tmp_path: Path) -> None:
    one = COUNT * (CROP_BYTES + ROW_BYTES)
    # Shards are an eighth of the limit: room for two sets of images, in parts.
    cache = CropCache(tmp_path / "crops", 2 * one + one // 4)
    sets = [write_images(tmp_path / f"set{i}", 100 * i) for i in range(3)]
    run(sets[0], cache)
    run(sets[1], cache)
    for path in cache.shards():  # make "before" certain, whatever the clock's tick
        os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**12))
    assert run(sets[0], cache)[1].cached == COUNT
    run(sets[2], cache)
    assert cache.size() <= cache.limit_bytes
    assert run(sets[0], cache)[1].cached == COUNT
    assert run(sets[2], cache)[1].cached == COUNT
    assert run(sets[1], cache)[1].cached < COUNT


def test_a_part_of_the_crops_is_stored_if_not_all_fit(tmp_path: Path) -> None:
    """Plain least-recently-used would remove each crop just before its next use."""
    folder = write_images(tmp_path / "images")
    plain, _ = run(folder, None)
    cache = CropCache(tmp_path / "crops", 6 * (CROP_BYTES + ROW_BYTES))
    for _ in range(3):
        got, reading = run(folder, cache)
        assert same(plain, got)
        assert cache.size() <= cache.limit_bytes
    assert reading.cached >= 4
    assert "is full" in reading.cache_problem


@pytest.mark.parametrize("limit", [0, 1000])
def test_a_cache_without_room_stores_nothing(folder: Path, tmp_path: Path, limit: int) -> None:
    cache = CropCache(tmp_path / "crops", limit)
    got, reading = run(folder, cache)
    assert same(got, run(folder, None)[0])
    assert cache.size() == 0
    assert reading.cache_problem == cache.problem(SPEC)
    assert f"nothing is cached: the cache's limit is {limit} bytes" in reading.cache_problem
    with pytest.raises(UsageError, match="-1 bytes"):
        CropCache(tmp_path, -1)


def test_a_cache_that_cannot_be_written_is_reported_without_an_error(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "crops").write_text("a file in its place")
    cache = CropCache(tmp_path / "crops" / "deeper")
    got, reading = run(folder, cache)
    assert same(got, run(folder, None)[0])
    assert "cannot be written" in reading.cache_problem
    assert cache.problem(SPEC) == f"nothing is cached: {tmp_path / 'crops'} is not a folder"


def test_with_a_limit_of_zero_no_crop_is_read(folder: Path, cache: CropCache) -> None:
    run(folder, cache)
    _, reading = run(folder, replace(cache, limit_bytes=0))
    assert reading.cached == 0
    assert reading.cache_problem == "nothing is cached: the cache's limit is 0 bytes"


def test_a_problem_is_known_before_the_run_and_only_if_there_is_one(
    folder: Path, cache: CropCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache.problem(SPEC) == ""
    assert not cache.folder.exists()
    assert run(folder, cache)[1].cache_problem == cache.problem(SPEC) == ""
    one = CROP_BYTES + ROW_BYTES
    assert replace(cache, limit_bytes=one).problem(SPEC) == ""
    assert f"one crop takes {one}" in replace(cache, limit_bytes=one - 1).problem(SPEC)
    # root may write anywhere, so a real folder without permission would not show the problem.
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert cache.problem(SPEC) == f"nothing is cached: {cache.folder} cannot be written"
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(cache.folder)._replace(free=CROP_BYTES)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert f"has only {CROP_BYTES} bytes free" in cache.problem(SPEC)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crop_has_the_fingerprint_of_its_pixels_from_every_source(
    folder: Path, cache: CropCache, workers: int
) -> None:
    """Decoded, from the cache by its file's stamp, and from the cache by its file's SHA-256."""
    decoded, _ = run(folder, cache, workers)
    cached, reading = run(folder, cache, workers)
    assert reading.cached == COUNT
    moved = shutil.copytree(folder, folder.parent / "moved")
    by_bytes, reading = run(moved, cache, workers)
    assert reading.cached == 0
    for crop in decoded + cached + by_bytes:
        assert crop.fingerprint == fingerprint(crop.pixels)
    assert len({crop.fingerprint for crop in decoded}) == COUNT


def test_a_full_disk_is_reported_without_an_error(folder: Path, cache: CropCache) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (CROP_BYTES * 5 // 2, before[1]))
    try:
        got, reading = run(folder, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in reading.cache_problem
    assert same(got, run(folder, None)[0])
    again, reading = run(folder, cache)
    assert reading.cached == 2
    assert same(got, again)


def test_a_run_of_hits_writes_nothing(folder: Path, cache: CropCache) -> None:
    plain, _ = run(folder, cache)
    before = sorted(cache.folder.rglob("*"))
    second, reading = run(folder, cache)
    assert reading.cached == COUNT
    assert same(plain, second)
    assert sorted(cache.folder.rglob("*")) == before


WRITER = """
import sys
from pathlib import Path
from clipdeploy.models import cards
from clipdeploy.imaging import crops
from clipdeploy.imaging import CropCache, iter_crops, open_images
from clipdeploy.core.passport import Recipe
crops._SETTLED_NS = 0
images, cache = open_images(Path(sys.argv[1])), CropCache(Path(sys.argv[2]))
spec = cards.find(cards.DEMO).preprocess(Recipe())
for number, crop in enumerate(iter_crops(images, spec, workers=0, cache=cache)):
    print(number, flush=True)
    sys.stdin.readline()
"""


def start_writer(folder: Path, cache: CropCache) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(cache.folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def step(writer: subprocess.Popen[str]) -> str:
    assert writer.stdin is not None
    assert writer.stdout is not None
    answer = writer.stdout.readline()
    writer.stdin.write("\n")
    writer.stdin.flush()
    return answer.strip()


def test_two_processes_write_at_once_and_one_is_killed(folder: Path, cache: CropCache) -> None:
    writers = [start_writer(folder, cache), start_writer(folder, cache)]
    for number in range(5):
        assert [step(writer) for writer in writers] == [str(number)] * 2
    writers[0].send_signal(signal.SIGKILL)
    assert writers[0].wait() == -signal.SIGKILL
    for number in range(5, COUNT):
        assert step(writers[1]) == str(number)
    for writer in writers:
        writer.communicate()
    assert writers[1].returncode == 0
    assert len(cache.shards()) == 2
    got, reading = run(folder, cache)
    assert reading.cached == COUNT
    assert same(got, run(folder, None)[0])


@pytest.fixture
def two_may_be_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow only two open shards."""
    monkeypatch.setattr("clipdeploy.imaging.crops._MAX_OPEN", 2)


def shard_each(folder: Path, cache: CropCache) -> ImageFolder:
    """Store every image of the folder in a separate shard."""
    images = open_images(folder)
    for entry in images.entries:
        run(ImageFolder(folder, (entry,)), cache)
    assert len(cache.shards()) == COUNT
    return images


@pytest.mark.usefixtures("two_may_be_open")
def test_another_process_may_empty_the_cache_under_a_run(folder: Path, cache: CropCache) -> None:
    many = ImageFolder(folder, shard_each(folder, cache).entries * 10)
    reading = Reading()
    stream = iter_crops(many, SPEC, workers=0, cache=cache, reading=reading)
    got = [next(stream)]
    shutil.rmtree(cache.folder)
    got += list(stream)
    assert 0 < reading.cached < 10 * COUNT
    assert same(got, run(many, None)[0])


def test_an_open_shard_can_be_read_after_its_removal(folder: Path, cache: CropCache) -> None:
    crop = run(folder, cache)[0][0]
    shut, opened = cache.open(SPEC), cache.open(SPEC)
    assert opened.get(crop.sha256) is not None
    shutil.rmtree(cache.folder)
    assert shut.get(crop.sha256) is None
    pixels = opened.get(crop.sha256)
    assert pixels is not None
    assert np.array_equal(pixels, crop.pixels)


@pytest.mark.usefixtures("two_may_be_open")
def test_more_shards_than_may_be_open_are_read(folder: Path, cache: CropCache) -> None:
    images = shard_each(folder, cache)
    got, reading = run(images, cache)
    assert reading.cached == COUNT
    assert same(got, run(images, None)[0])
    shelf = cache.open(SPEC)
    for crop in got:
        assert shelf.get(crop.sha256) is not None
        assert 1 <= open_shards() <= 2
    shelf.close()
    assert open_shards() == 0


def open_shards() -> int:
    """How many shards this process has open."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link).endswith(".items") for link in links)


def test_the_default_folder_is_in_clipdeploy_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIPDEPLOY_HOME", str(tmp_path / "home"))
    assert CropCache.default().folder == tmp_path / "home" / "crops"
