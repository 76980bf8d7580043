from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipdeploy.core.errors import DatasetError
from clipdeploy.core.passport import Recipe
from clipdeploy.imaging import Crop, ImageEntry, ImageFolder, Skipped, iter_crops, open_images
from clipdeploy.imaging.decoding import Loaded, Source, usable_cores
from clipdeploy.imaging.fingerprints import fingerprint
from clipdeploy.imaging.loader import ProcessLoader
from clipdeploy.models import cards

SPEC = cards.find(cards.DEMO).preprocess(Recipe())
pytestmark = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="worker processes need Linux's memory files"
)


def photo(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty images of the kinds that preprocessing treats differently."""
    root = tmp_path / "images"
    root.mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    wide = np.random.default_rng(0).integers(0, 65536, (40, 56), np.uint16)
    for seed in range(0, 30, 6):
        photo(seed).save(root / f"{seed:02d}.jpg", quality=90, exif=rotated)
        photo(seed + 1, "CMYK").save(root / f"{seed + 1:02d}.jpg")
        photo(seed + 2, "L").save(root / f"{seed + 2:02d}.png")
        photo(seed + 3, "P").save(root / f"{seed + 3:02d}.gif")
        photo(seed + 4, "RGBA").save(root / f"{seed + 4:02d}.webp")
        Image.fromarray(wide + seed).save(root / f"{seed + 5:02d}.tif")
    return root


def children() -> set[int]:
    """Process ids of this process's children, zombies included."""
    return {
        int(child)
        for task in Path("/proc/self/task").iterdir()
        for child in (task / "children").read_text().split()
    }


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not done():
        if time.monotonic() > deadline:
            pytest.fail(f"still not so after 30 s: {what}")
        time.sleep(0.02)


def same(one: list[Crop], two: list[Crop]) -> bool:
    return len(one) == len(two) and all(
        (a.entry, a.sha256, a.fingerprint) == (b.entry, b.sha256, b.fingerprint)
        and np.array_equal(a.pixels, b.pixels)
        for a, b in zip(one, two, strict=True)
    )


def test_processes_give_the_same_bytes_as_this_process(folder: Path) -> None:
    images = open_images(folder)
    # Three rounds, so that each slot is used again.
    thrice = ImageFolder(images.root, images.entries * 3)
    here = list(iter_crops(thrice, SPEC, workers=0))
    there = list(iter_crops(thrice, SPEC, workers=2))
    assert len(here) == 90
    assert same(here, there)
    # The comparison detects an orientation that is not applied, and a changed order.
    assert not same(here, list(iter_crops(thrice, replace(SPEC, exif_orientation=False))))
    assert not same(here, there[1:] + there[:1])


def test_crops_are_copies_of_their_slots(folder: Path) -> None:
    """Slots are reused, so a view would change."""
    images = open_images(folder)
    many = ImageFolder(images.root, images.entries * 4)
    kept = [(crop.pixels, crop.pixels.copy()) for crop in iter_crops(many, SPEC, workers=1)]
    assert len(kept) > ProcessLoader(Source(folder, SPEC), 1).capacity
    assert all(np.array_equal(pixels, copy) for pixels, copy in kept)


def test_submitted_images_are_decoded_before_result_is_called(folder: Path) -> None:
    """The consumer may take cached crops first."""
    loader = ProcessLoader(Source(folder, SPEC), 1)
    try:
        loader.submit("00.jpg", None)
        loader.submit("01.jpg", None)
        loader.send()
        (worker,) = loader._workers
        wait_until(lambda: worker.answers.poll(), "an answer")
        for name in ("00.jpg", "01.jpg"):
            result = loader.result()
            assert isinstance(result, Loaded)
            assert result.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
            assert result.fingerprint == fingerprint(result.pixels)
    finally:
        loader.close()


def test_unreadable_images_are_reported_as_in_this_process(folder: Path) -> None:
    (folder / "04.webp").write_bytes((folder / "04.webp").read_bytes()[:100])
    (folder / "07.jpg").write_bytes(b"")
    images = open_images(folder)
    (folder / "11.tif").unlink()
    texts, left_out = [], []
    for workers in (0, 2):
        with pytest.raises(DatasetError, match=r"04\.webp") as caught:
            list(iter_crops(images, SPEC, workers=workers))
        skipped = Skipped()
        assert len(list(iter_crops(images, SPEC, workers=workers, skipped=skipped))) == 27
        texts.append(str(caught.value))
        left_out.append(skipped.names)
    assert texts[0] == texts[1]
    assert left_out[0] == left_out[1] == ["04.webp", "07.jpg", "11.tif"]


def test_no_process_is_left_when_the_consumer_stops_early(folder: Path) -> None:
    images = open_images(folder)
    before = children()
    crops = iter_crops(images, SPEC, workers=2)
    next(crops)
    assert len(children() - before) == 2
    crops.close()
    assert children() == before


@pytest.mark.parametrize("size", [224, 32])
def test_little_work_starts_no_process(folder: Path, size: int) -> None:
    images = open_images(folder)
    before = children()
    crops = iter_crops(ImageFolder(folder, images.entries * 6), replace(SPEC, size=size))
    next(crops)
    assert children() == before
    crops.close()


def test_much_work_starts_processes(folder: Path) -> None:
    before = children()
    images = open_images(folder)
    each = sum((folder / entry.name).stat().st_size for entry in images.entries)
    # 20 MB of images, estimated from a few of them.
    many = ImageFolder(folder, images.entries * math.ceil(22e6 / each))
    crops = iter_crops(many, SPEC)
    next(crops)
    assert before < children()
    crops.close()


def with_a_pipe(folder: Path) -> ImageFolder:
    """One image, then a named pipe without a writer, so that its reader blocks forever."""
    (entry, *_) = open_images(folder).entries
    os.mkfifo(folder / "stuck.png")
    return ImageFolder(folder, (entry, ImageEntry("stuck.png", None), entry))


@pytest.mark.parametrize("allowed", [False, True], ids=["strict", "skipping"])
def test_a_killed_worker_is_an_error_that_names_its_image(folder: Path, allowed: bool) -> None:
    before = children()
    # It may have run out of memory, which is not the image's fault, so it is never skipped.
    skipped = Skipped() if allowed else None
    crops = iter_crops(with_a_pipe(folder), SPEC, workers=1, skipped=skipped)
    next(crops)
    (worker,) = children() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(DatasetError, match=r"Killed \(signal 9\) while decoding .*/stuck\.png"):
        next(crops)
    assert children() == before


def test_a_bug_in_a_worker_is_not_an_unreadable_image(folder: Path) -> None:
    images = open_images(folder)
    nonsense = replace(SPEC, crop_pct=0.0)
    skipped = Skipped()
    with pytest.raises(RuntimeError, match=r"failed on 00\.jpg: (.|\n)*ZeroDivisionError"):
        list(iter_crops(images, nonsense, workers=1, skipped=skipped))
    assert skipped.names == []


def test_a_worker_that_cannot_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(folder)
    monkeypatch.setattr(sys, "executable", str(folder / "no-python"))
    with pytest.raises(
        DatasetError, match=r"cannot start an image decoding process: .*--workers 0"
    ):
        list(iter_crops(images, SPEC, workers=1))
    assert len(list(iter_crops(images, SPEC, workers=0))) == 30
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DatasetError, match="ended with exit code 1"):
        list(iter_crops(images, SPEC, workers=1))


CONSUMER = """
import os, sys
from pathlib import Path
from clipdeploy.models import cards
from clipdeploy.imaging import ImageFolder, iter_crops, open_images
from clipdeploy.core.passport import Recipe
images = open_images(Path(sys.argv[1]))
images = ImageFolder(images.root, images.entries * 100_000)
spec = cards.find(cards.DEMO).preprocess(Recipe())
for number, crop in enumerate(iter_crops(images, spec, workers=2)):
    if number == 100:
        print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
"""


@pytest.mark.usefixtures("python_hears_ctrl_c")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_no_memory(
    folder: Path, how: signal.Signals
) -> None:
    shared = set(os.listdir("/dev/shm"))
    run = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_running, workers))
    os.killpg(run.pid, how)  # as the terminal does it: the whole group
    _, errors = run.communicate()
    assert run.returncode == -how
    wait_until(lambda: not any(map(is_running, workers)), "the workers ended")
    assert set(os.listdir("/dev/shm")) == shared
    if how == signal.SIGINT:
        # Only the run's own traceback; the workers print nothing.
        assert "KeyboardInterrupt" in errors
        assert "in serve" not in errors


MEMORY = """
import os, sys
from pathlib import Path
from clipdeploy.models import cards
from clipdeploy.imaging import ImageFolder, iter_crops, open_images
from clipdeploy.core.passport import Recipe

def resident():
    workers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    assert len(workers) == 2
    pages = [Path(f"/proc/{pid}/statm").read_text().split()[1:3] for pid in ("self", *workers)]
    # Without pages of files, which the system takes back when it likes.
    return sum(int(every) - int(shared) for every, shared in pages) * os.sysconf("SC_PAGE_SIZE")

images = open_images(Path(sys.argv[1]))
images = ImageFolder(images.root, images.entries * 1000)
kept = []
spec = cards.find(cards.DEMO).preprocess(Recipe())
for number, crop in enumerate(iter_crops(images, spec, workers=2)):
    if sys.argv[2] == "keep":
        kept.append(crop.pixels)
    if number == 1000:
        start = resident()
    if number == len(images.entries) - 50:
        print(resident() - start)
"""


def test_memory_does_not_grow_with_the_images(folder: Path) -> None:
    for path in folder.iterdir():
        if path.suffix != ".png":  # the quickest
            path.unlink()
    growth = {}
    for mode in ("drop", "keep"):
        command = [sys.executable, "-c", MEMORY, str(folder), mode]
        growth[mode] = int(subprocess.check_output(command, text=True))
    count = len(open_images(folder).entries) * 1000 - 1050
    # Crops have 3072 bytes; a quarter allows for memory that three allocators retain, or have free.
    assert growth["drop"] < count * 3072 / 4
    assert growth["keep"] > count * 3072 * 3 / 4


def test_slots_are_bounded_for_every_size_and_core_count() -> None:
    for size in (32, 224, 448):
        for workers in (1, 8, 64):
            loader = ProcessLoader(Source(Path("."), replace(SPEC, size=size)), workers)
            # At least two per worker, otherwise it waits for this process after each image.
            assert loader.capacity >= 2 * workers
            assert loader.capacity * size * size * 3 <= max(96 << 20, 2 * workers * size * size * 3)
            loader.close()


def test_workers_import_neither_torch_nor_onnx() -> None:
    code = "import sys, clipdeploy.imaging.loader, clipdeploy.imaging; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "clipdeploy.imaging.loader" in modules
    assert not {"torch", "onnx", "onnxruntime", "scipy", "rich", "click"} & set(modules)


def test_usable_cores_follow_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= usable_cores() <= len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
