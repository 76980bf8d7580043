"""The probe against logits of the libraries: the right reading passes, each wrong one is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from clipdeploy.core.errors import CheckpointError, FileError
from clipdeploy.core.passport import IMAGENET_MEAN, IMAGENET_STD, ModelChoices, Recipe
from clipdeploy.models import cards
from clipdeploy.models.load import LoadedModel, WeightsChoice, infer_card, load_model
from clipdeploy.models.probe import PROBE_TOLERANCE, prove, read_probe
from exporters.samples import normalise

DATA = Path(__file__).with_name("data") / "oracles"
LOGITS = np.load(DATA / "logits.npz")


def load(file: str, heads: int = 2, size: int | None = None, **choices: Any) -> LoadedModel:
    choice = WeightsChoice(
        DATA / file, choices=ModelChoices(**choices), heads=heads, image_size=size
    )
    return load_model(infer_card(choice), choice, Recipe())


def written(path: Path, **arrays: NDArray[Any]) -> Path:
    np.savez(path / "probe.npz", **arrays)  # type: ignore[arg-type]
    return path / "probe.npz"


def probe_of(name: str, path: Path, size: int = 32) -> Path:
    return written(path, inputs=LOGITS[f"images-{size}"], logits=LOGITS[name])


# Logits, file, options with which it is read wrongly, and the option that the hint names.
WRONG: list[tuple[str, str, dict[str, Any], str]] = [
    ("timm-flat", "timm-flat.pth", {"gelu": "quick"}, "--gelu erf"),
    ("openai-head", "openai-head.pt", {"gelu": "erf"}, "--gelu quick"),
    ("hf-clip", "hf-clip", {"pooling": "token"}, "--pooling avg"),
    ("timm-best-raw", "timm-best.pth.tar", {}, "--no-ema"),
    ("timm-best-ema", "timm-best.pth.tar", {"averaged": False}, "--ema"),
    ("timm-flat", "timm-flat.pth", {"heads": 4}, "--heads 2"),
    ("timm-flat-16px", "timm-flat.pth", {"size": 16, "resampling": "mmpretrain"}, "--resampling"),
]


@pytest.mark.parametrize(("name", "file", "options", "mend"), WRONG)
def test_a_wrong_reading_is_named(
    name: str, file: str, options: dict[str, Any], mend: str, tmp_path: Path
) -> None:
    probe = read_probe(probe_of(name, tmp_path, options.get("size", 32)))
    with pytest.raises(CheckpointError, match="they agree") as caught:
        prove(load(file, **options), probe)
    assert mend in caught.value.hint


# Logits, file, and two options with which it is read wrongly.
PAIRS: list[tuple[str, str, dict[str, Any], set[str]]] = [
    (
        "timm-best-raw",
        "timm-best.pth.tar",
        {"gelu": "quick"},
        {"--gelu erf", "--no-ema"},
    ),
    (
        "timm-flat",
        "timm-flat.pth",
        {"gelu": "quick", "pooling": "avg"},
        {"--gelu erf", "--pooling token"},
    ),
]


@pytest.mark.parametrize(("name", "file", "options", "mends"), PAIRS)
def test_two_wrong_readings_are_named(
    name: str, file: str, options: dict[str, Any], mends: set[str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r" and .* they agree") as caught:
        prove(load(file, **options), read_probe(probe_of(name, tmp_path)))
    assert all(mend in caught.value.hint for mend in mends)


@pytest.mark.parametrize("name", ["timm-flat", "lightning", "hf-vit"])
def test_the_right_reading_passes(name: str, tmp_path: Path) -> None:
    file = {"timm-flat": "timm-flat.pth", "lightning": "lightning.ckpt"}.get(name, name)
    assert prove(load(file), read_probe(probe_of(name, tmp_path))) <= PROBE_TOLERANCE


def test_other_logits_are_explained_by_nothing(tmp_path: Path) -> None:
    probe = read_probe(probe_of("lightning", tmp_path))
    with pytest.raises(CheckpointError, match="neither one of the usual causes nor two"):
        prove(load("timm-flat.pth"), probe)


def test_mean_std_and_channel_order_are_named(demo_model: LoadedModel, tmp_path: Path) -> None:
    import torch

    images = np.random.default_rng(3).integers(0, 256, (2, 32, 32, 3), np.uint8)
    spec = cards.find(cards.DEMO).preprocess(Recipe())
    from dataclasses import replace

    other = replace(spec, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    for pixels, words in (
        (normalise(images, other), "ImageNet's mean and std"),
        (normalise(images, other)[:, ::-1], "red and blue exchanged and ImageNet's mean and std"),
        (normalise(images, spec)[:, ::-1], "red and blue"),
    ):
        with torch.no_grad():
            logits = demo_model.module(torch.from_numpy(np.ascontiguousarray(pixels))).numpy()
        probe = read_probe(written(tmp_path, images=images, logits=logits))
        with pytest.raises(CheckpointError, match=words):
            prove(demo_model, probe)


def test_other_files_are_no_probes(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_probe(tmp_path / "none.npz")
    good = {"inputs": LOGITS["images-32"], "logits": LOGITS["timm-flat"]}
    for arrays in (
        {},
        {"logits": good["logits"]},
        {"inputs": good["inputs"]},
        good | {"logits": good["logits"][:1]},
        good | {"logits": good["logits"] * np.nan},
        good | {"inputs": good["inputs"].astype(np.int64)},
        {"images": good["inputs"], "logits": good["logits"]},
        good | {"images": np.zeros((2, 32, 32, 3), np.uint8)},
    ):
        with pytest.raises(CheckpointError, match="not a probe"):
            read_probe(written(tmp_path, **arrays))
    (tmp_path / "x.npz").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a probe"):
        read_probe(tmp_path / "x.npz")


def test_a_probe_does_not_unpickle(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = written(tmp_path, logits=np.array([Trap()], dtype=object), inputs=np.ones(1))
    with pytest.raises(CheckpointError):
        read_probe(path)
    assert not (tmp_path / "sprung").exists()


def test_a_probe_of_another_size_is_refused(tmp_path: Path) -> None:
    probe = read_probe(probe_of("timm-flat-16px", tmp_path, 16))
    with pytest.raises(CheckpointError, match="16x16 px"):
        prove(load("timm-flat.pth"), probe)
