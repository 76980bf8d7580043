"""PyTorch's logits are computed once for the same images with the same neighbours."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pixel_changes import PIXEL_CHANGES, change_pixels, change_source

from clipdeploy.core.passport import IMAGENET_MEAN, Preprocess
from clipdeploy.imaging import Crop, CropCache, iter_crops, open_images, select
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners.torch import TorchRunner
from clipdeploy.verification import reference
from clipdeploy.verification.reference import Reference
from exporters.samples import Samples


@pytest.fixture(scope="module")
def spec(demo_model: LoadedModel) -> Preprocess:
    return demo_model.card.preprocess(demo_model.recipe)


@pytest.fixture(scope="module")
def crops(spec: Preprocess) -> list[Crop]:
    digits = select(open_images(cards.demo_file("test.zip")), 12, seed=0)
    return list(iter_crops(digits, spec, workers=0))


@pytest.fixture
def cache(tmp_path: Path) -> CropCache:
    return CropCache(tmp_path / "cache")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of every batch that PyTorch really computes."""
    sizes: list[int] = []
    real = TorchRunner.__call__

    def counted(self: TorchRunner, images: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes.append(len(images))
        return real(self, images)

    monkeypatch.setattr(TorchRunner, "__call__", counted)
    return sizes


def logits(
    model: LoadedModel, spec: Preprocess, cache: CropCache | None, crops: list[Crop]
) -> NDArray[np.float32]:
    samples = Samples(np.stack([crop.pixels for crop in crops]), spec)
    with closing(Reference(model, spec, cache)) as judge:
        return judge([crop.sha256 for crop in crops], samples)


def test_a_hit_is_bit_identical_and_computes_nothing(
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
) -> None:
    plain = logits(demo_model, spec, None, crops)
    first = logits(demo_model, spec, cache, crops)
    assert computed == [12, 12]
    second = logits(demo_model, spec, cache, crops)
    assert computed == [12, 12]
    assert second.dtype == np.float32
    assert plain.tobytes() == first.tobytes() == second.tobytes()


def test_other_neighbours_are_another_key(
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
) -> None:
    """A batch of another size or order may differ in the last bit, and is computed again."""
    logits(demo_model, spec, cache, crops)
    for other in (crops[:6], crops[::-1], [*crops[1:], crops[0]]):
        before = len(computed)
        logits(demo_model, spec, cache, other)
        assert len(computed) == before + 1
    before = len(computed)
    for other in (crops, crops[:6], crops[::-1]):
        assert (
            logits(demo_model, spec, cache, other) == logits(demo_model, spec, None, other)
        ).all()
    assert len(computed) == before + 3


def test_whatever_decides_the_logits_is_in_the_key(
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits(demo_model, spec, cache, crops)
    shipped = replace(demo_model.recipe, numerics="as-shipped")
    for model, preparation in (
        (replace(demo_model, weights=replace(demo_model.weights, sha256="0" * 64)), spec),
        (replace(demo_model, recipe=shipped), spec),
        (demo_model, replace(spec, mean=IMAGENET_MEAN)),
    ):
        before = len(computed)
        logits(model, preparation, cache, crops)
        assert len(computed) == before + 1
    before = len(computed)
    monkeypatch.setattr("torch.get_num_threads", lambda: 99)
    logits(demo_model, spec, cache, crops)
    assert len(computed) == before + 1


LOGIT_CHANGES = (
    "clipdeploy.models.checkpoints.canonical",
    "clipdeploy.models.checkpoints.layouts.timm",
    "clipdeploy.models.checkpoints.select",
    "clipdeploy.models.load",
    "clipdeploy.runners.torch",
    "clipdeploy.models.vit",
    "exporters.preprocess_graph",
    "exporters.samples",
)


@pytest.mark.parametrize("changed", [*PIXEL_CHANGES, *LOGIT_CHANGES, "PyTorch", "processor"])
def test_no_logits_are_served_that_other_code_or_another_decoder_made(
    changed: str,
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    logits(demo_model, spec, cache, crops)
    logits(demo_model, spec, cache, crops)
    assert computed == [12]
    with monkeypatch.context() as patch:
        if changed in LOGIT_CHANGES:
            change_source(changed, patch, tmp_path)
        elif changed == "PyTorch":
            patch.setattr(reference, "library_versions", lambda: {"torch": "0.0.0"})
        elif changed == "processor":
            patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
        else:
            change_pixels(changed, patch, tmp_path)
        logits(demo_model, spec, cache, crops)
        assert computed == [12, 12]
    logits(demo_model, spec, cache, crops)
    assert computed == [12, 12]


def test_other_pixels_of_the_same_files_are_another_key(
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
) -> None:
    """A rebuilt decoder may have the same version."""
    before = logits(demo_model, spec, cache, crops)
    darker = [replace(crop, pixels=crop.pixels // 2) for crop in crops]
    after = logits(demo_model, spec, cache, darker)
    assert computed == [12, 12]
    assert after.tobytes() == logits(demo_model, spec, None, darker).tobytes() != before.tobytes()


def items(cache: CropCache) -> list[Path]:
    return sorted(cache.folder.glob("logits-*/*.items"))


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_damaged_logits_are_computed_again(
    damage: str,
    demo_model: LoadedModel,
    spec: Preprocess,
    cache: CropCache,
    crops: list[Crop],
    computed: list[int],
) -> None:
    whole = logits(demo_model, spec, cache, crops)
    (path,) = items(cache)
    data = bytearray(path.read_bytes())
    assert len(data) == 12 * 10 * 4
    if damage == "flipped":
        data[45] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    assert logits(demo_model, spec, cache, crops).tobytes() == whole.tobytes()
    assert computed == [12, 12]
    # Repaired: the next run computes nothing.
    assert logits(demo_model, spec, cache, crops).tobytes() == whole.tobytes()
    assert computed == [12, 12]


def test_a_cache_with_no_room_is_no_error(
    demo_model: LoadedModel, spec: Preprocess, tmp_path: Path, crops: list[Crop]
) -> None:
    none = CropCache(tmp_path / "none", 0)
    assert (logits(demo_model, spec, none, crops) == logits(demo_model, spec, None, crops)).all()
    assert not items(none)


def test_it_says_why_no_logits_are_kept(
    demo_model: LoadedModel, spec: Preprocess, cache: CropCache, tmp_path: Path, crops: list[Crop]
) -> None:
    for kept, problem in (
        (None, ""),
        (cache, ""),
        (CropCache(tmp_path / "none", 0), "nothing is cached: the cache's limit is 0 bytes"),
    ):
        with closing(Reference(demo_model, spec, kept)) as judge:
            assert judge.cache_problem == problem
    (tmp_path / "file").write_text("in its place")
    samples = Samples(np.stack([crop.pixels for crop in crops]), spec)
    with closing(Reference(demo_model, spec, CropCache(tmp_path / "file" / "in"))) as judge:
        judge([crop.sha256 for crop in crops], samples)
        assert "cannot be written" in judge.cache_problem
