"""Checkpoint files: sound, damaged and of another model.

Covers: clipdeploy/models/checkpoints/archive.py, clipdeploy/models/checkpoints/checkpoint.py,
    clipdeploy/models/checkpoints/position.py.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_files import mmpretrain_keys, write_legacy_flat, write_nested_zip
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from clipdeploy.core.errors import CheckpointError, FileError
from clipdeploy.models.checkpoints import read_checkpoint, resize_position_grid, validate
from clipdeploy.models.load import random_tensors
from clipdeploy.models.vit import ViTConfig

CONFIG = ViTConfig(patch=4, image_size=16, classes=5, width=32, depth=2, heads=2)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, 7)


def _with_module_prefix(tensors: Tensors, path: Path) -> Path:
    torch.save({f"module.{key}": value for key, value in mmpretrain_keys(tensors).items()}, path)
    return path


def _timm_nested(tensors: Tensors, path: Path) -> Path:
    torch.save({"model": tensors}, path)
    return path


def _timm_bin(tensors: Tensors, path: Path) -> Path:
    torch.save(tensors, path.with_suffix(".bin"))
    return path.with_suffix(".bin")


def _timm_safetensors(tensors: Tensors, path: Path) -> Path:
    save_file(tensors, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize(
    ("write", "layout"),
    [
        (write_legacy_flat, "mmpretrain (flat pth)"),
        (write_nested_zip, "mmpretrain (nested pth)"),
        (_with_module_prefix, "mmpretrain (flat pth)"),
        (_timm_nested, "timm (nested pth)"),
        (_timm_bin, "timm (flat bin)"),
        (_timm_safetensors, "timm (flat safetensors)"),
    ],
)
def test_every_wrapping_reads_back_the_same_tensors(
    write: Callable[[Tensors, Path], Path], layout: str, tensors: Tensors, tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(write(tensors, tmp_path / "weights.pth"))
    assert checkpoint.layout == layout
    assert checkpoint.classes == 5
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(checkpoint.tensors[name], value), name
    validate(checkpoint, CONFIG, "a model")


def test_half_precision_weights_become_float32(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "half.pth"
    torch.save({name: value.half() for name, value in tensors.items()}, path)
    found = read_checkpoint(path).tensors
    assert all(value.dtype == torch.float32 for value in found.values())


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("write", [write_legacy_flat, write_nested_zip, _timm_safetensors])
def test_a_truncated_file_is_refused(
    keep: float, write: Callable[[Tensors, Path], Path], tensors: Tensors, tmp_path: Path
) -> None:
    path = write(tensors, tmp_path / "weights.pth")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    path = tmp_path / "trap.pth"
    torch.save({"backbone.cls_token": Trap()}, path)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(path)
    assert not (tmp_path / "sprung").exists()


def test_missing_extra_and_misshapen_tensors_are_all_named(
    tensors: Tensors, tmp_path: Path
) -> None:
    broken = dict(tensors)
    del broken["blocks.1.mlp.fc2.bias"]
    broken["blocks.1.mlp.fc3.bias"] = torch.zeros(3)
    broken["norm.weight"] = torch.zeros(7)
    checkpoint = read_checkpoint(write_nested_zip(broken, tmp_path / "weights.pth"))
    with pytest.raises(CheckpointError) as caught:
        validate(checkpoint, CONFIG, "a model")
    for words in (
        "missing: blocks.1.mlp.fc2.bias",
        "blocks.1.mlp.fc3.bias",
        "norm.weight is (7,), not (32,)",
    ):
        assert words in caught.value.message


def test_nan_weights_are_named(tensors: Tensors, tmp_path: Path) -> None:
    broken = dict(tensors)
    broken["blocks.0.attn.qkv.bias"] = torch.full((96,), float("nan"))
    checkpoint = read_checkpoint(write_legacy_flat(broken, tmp_path / "weights.pth"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.bias"):
        validate(checkpoint, CONFIG, "a model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "no state dict"),
        ([1, 2], "no state dict"),
        ({"epoch": 3, "backbone.cls_token": torch.zeros(1)}, "epoch"),
        ({"features.0.weight": torch.zeros(3)}, "none of the layouts of timm, mmpretrain"),
    ],
)
def test_other_files_are_refused(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(path)


def test_a_missing_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    position = torch.randn(1, 26, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_position_grid(position, 5), position)


def _cubic_matrix(old: int, new: int) -> NDArray[np.float64]:
    """Rows of bicubic weights (Keys 1981, a = -0.75), half-pixel centres, borders repeated."""
    a, matrix = -0.75, np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            matrix[row, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return matrix


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (14, 24)])
def test_resizing_is_bicubic_without_antialiasing(old: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(1, 1 + old * old, 3, generator=generator)
    resized = resize_position_grid(position, new)
    matrix = _cubic_matrix(old, new)
    grid = position[0, 1:].reshape(old, old, 3).double().numpy()
    expected = np.einsum("ia,jb,abc->ijc", matrix, matrix, grid)
    assert torch.equal(resized[:, 0], position[:, 0])
    # float32 sums of sixteen products of values around 1.
    np.testing.assert_allclose(resized[0, 1:].reshape(new, new, 3), expected, atol=5e-6)


@pytest.mark.usefixtures("python_hears_ctrl_c")
def test_an_interrupt_inside_the_reader_is_not_a_file_error(
    tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _timm_safetensors(tensors, tmp_path / "weights")
    real, ended = safetensors.torch.load_file, []

    def interrupted(file: Path) -> Tensors:
        os.kill(os.getpid(), signal.SIGINT)
        loaded = real(file)
        ended.append(file)
        return loaded

    monkeypatch.setattr(safetensors.torch, "load_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_checkpoint(path)
    assert ended == [path]
    monkeypatch.undo()
    assert read_checkpoint(path).tensors.keys() == tensors.keys()


def _plain(dtype: torch.dtype) -> Tensor:
    return torch.arange(4).to(dtype)


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    **{
        str(dtype): (lambda dtype=dtype: _plain(dtype), str(dtype).removeprefix("torch."))
        for dtype in (
            torch.int8,
            torch.uint8,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
        )
    },
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8), "qint8"),
    "sparse": (lambda: torch.eye(4).to_sparse(), "sparse_coo float32"),
    "compressed": (lambda: torch.eye(4).to_sparse_csr(), "sparse_csr float32"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a nested tensor of float32",
    ),
    "meta": (lambda: torch.ones(4, device="meta"), "without data"),
    "endless": (lambda: torch.ones(1).half().expand(2**24, 2**24), "with only 2 bytes"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_floating_point_are_named(
    kind: str, tensors: Tensors, tmp_path: Path
) -> None:
    """A cast to float32 would silently change them."""
    make, word = ODD[kind]
    for name, keys in (("timm", lambda found: found), ("mmpretrain", mmpretrain_keys)):
        path = tmp_path / f"{name}.pth"
        torch.save(keys({**tensors, "blocks.1.norm2.bias": make()}), path)
        with pytest.raises(CheckpointError, match=r"(norm2|ln2)\.bias is .*") as found:
            read_checkpoint(path)
        assert word in found.value.message
        assert "float32" in found.value.hint


def test_integers_in_a_safetensors_file_are_named(tensors: Tensors, tmp_path: Path) -> None:
    save_file(
        {**tensors, "head.bias": torch.ones(5, dtype=torch.int32)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"head\.bias is int32"):
        read_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_is_accepted(dtype: torch.dtype, tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({name: value.to(dtype) for name, value in tensors.items()}, path)
    found = read_checkpoint(path).tensors
    assert all(torch.equal(found[name], tensors[name].to(dtype).float()) for name in tensors)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_dictionary_inside_itself_ends(zipped: bool, tmp_path: Path) -> None:
    inner: dict[str, object] = {}
    inner["state_dict"] = {"model": inner}
    path = tmp_path / "loop.pth"
    torch.save(inner, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="no state dict"):
        read_checkpoint(path)


class Custom:
    pass


def _script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))  # type: ignore[no-untyped-call]


NO_CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "an object": lambda path: torch.save({"a": Custom()}, path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"a": print})),
    "an old pickle": lambda path: torch.save(
        {"a": Custom()}, path, _use_new_zipfile_serialization=False
    ),
    "TorchScript": _script,
    "a few bytes": lambda path: path.write_bytes(b"junk"),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
    "an empty zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "a pickle of nothing": lambda path: path.write_bytes(b"\x80\x02."),
    **{
        f"random bytes {seed}": lambda path, seed=seed: path.write_bytes(
            (b"", b"\x80\x02", b"PK\x03\x04")[seed % 3]
            + np.random.default_rng(seed).bytes(20 * seed + 1)
        )
        for seed in range(12)
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_messages_do_not_advise_unsafe_loading(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    NO_CHECKPOINTS[kind](path)
    with pytest.raises(CheckpointError) as found:
        read_checkpoint(path)
    message = str(found.value)
    assert not re.search(r"weights.?only|torch\.load|trust|pytorch\.org", message, re.IGNORECASE)
    assert "\n" not in message
    assert "\x1b" not in message


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_special_files_do_not_block(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(FileError, match=r"weights\.pth"):
        read_checkpoint(path)
