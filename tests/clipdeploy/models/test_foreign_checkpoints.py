"""Files that are no ViT classifier, and pickles that would run code.

Covers: clipdeploy/models/checkpoints/foreign.py, clipdeploy/models/checkpoints/select.py,
    clipdeploy/models/checkpoints/unpickle.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipdeploy.core.errors import CheckpointError, FileError
from clipdeploy.core.passport import ModelChoices
from clipdeploy.models.checkpoints import read_checkpoint, validate
from clipdeploy.models.checkpoints.unpickle import read_pickle
from clipdeploy.models.load import random_tensors
from clipdeploy.models.vit import ViTConfig

CONFIG = ViTConfig(patch=4, image_size=16, classes=5, width=32, depth=1, heads=2)

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, 7)


def refusal(content: object, tmp_path: Path) -> CheckpointError:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    return caught.value


# Names of other architectures' tensors, beside those of a ViT.
FOREIGN = {
    "layers.0.blocks.0.attn.relative_position_bias_table": "Swin Transformer",
    "blocks.0.attn.q_bias": "EVA",
    "attn_pool.latent": "SigLIP",
    "dist_token": "DeiT",
    "reg_token": "DINOv2",
    "blocks.0.attn.q_norm.weight": "normalised queries",
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("alone", [True, False])
def test_other_architectures_are_named_without_advice_that_cannot_help(
    name: str, alone: bool, tensors: Tensors, tmp_path: Path
) -> None:
    error = refusal({**({} if alone else tensors), name: torch.zeros(3, 2)}, tmp_path)
    assert FOREIGN[name] in error.message
    assert "--" not in error.hint


def test_lora_weights_need_a_merge(tensors: Tensors, tmp_path: Path) -> None:
    lora = {
        "base_model.model.vit.blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(4, 32),
        "base_model.model.vit.blocks.0.attn.qkv.lora_B.default.weight": torch.zeros(96, 4),
    }
    for content in (lora, tensors | lora):
        error = refusal(content, tmp_path)
        assert "LoRA" in error.message
        assert "merge_and_unload" in error.hint


def test_a_head_alone_needs_its_backbone(tmp_path: Path) -> None:
    head = {"head.weight": torch.zeros(5, 32), "head.bias": torch.zeros(5)}
    assert "only a head" in refusal(head, tmp_path).message


def test_a_backbone_alone_needs_its_head(tensors: Tensors, tmp_path: Path) -> None:
    backbone = {name: value for name, value in tensors.items() if not name.startswith("head")}
    assert "without a classification head" in refusal(backbone, tmp_path).message


def test_an_unknown_layout_is_compared_with_the_closest(tensors: Tensors, tmp_path: Path) -> None:
    renamed = {name.replace("patch_embed.proj", "stem"): value for name, value in tensors.items()}
    error = refusal(renamed, tmp_path)
    assert "closest to the layout of timm" in error.message
    assert "stem.weight" in error.message


def test_two_models_in_a_file_are_not_confused(tensors: Tensors, tmp_path: Path) -> None:
    two = {f"{who}.{n}": v for who in ("student", "teacher") for n, v in tensors.items()}
    assert "2 models: student, teacher" in refusal(two, tmp_path).message


def test_a_normalisation_beside_the_model_is_not_ignored(tensors: Tensors, tmp_path: Path) -> None:
    wrapped = {f"1.{name}": value for name, value in tensors.items()}
    error = refusal({"0.mean": torch.zeros(3), **wrapped}, tmp_path)
    assert "0.mean" in error.message


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.model."])
def test_prefixes_of_wrappers_are_stripped(prefix: str, tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({f"{prefix}{name}": value for name, value in tensors.items()}, path)
    found = read_checkpoint(path).tensors
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert found.keys() == tensors.keys()


# Prefixes in one state dict, as of a module that contains its average.
PAIRS = [("model.", "model_ema."), ("model.", "ema_model.module."), ("", "ema."), ("net.", "swa.")]


@pytest.mark.parametrize(("raw", "ema"), PAIRS)
def test_both_kinds_of_weights_in_one_state_dict(
    raw: str, ema: str, tensors: Tensors, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    both = {raw + name: value for name, value in tensors.items()}
    both |= {ema + name: value + 1 for name, value in tensors.items()}
    torch.save({"state_dict": both}, path)
    for choice, shift in ((None, 1), (True, 1), (False, 0)):
        found = read_checkpoint(path, ModelChoices(averaged=choice))
        assert found.tensors.keys() == tensors.keys()
        assert torch.equal(found.tensors["head.bias"], tensors["head.bias"] + shift)
    for beside in (raw, ema):
        torch.save({"state_dict": both | {f"{beside}prompt": torch.zeros(2)}}, path)
        with pytest.raises(CheckpointError, match="prompt"):
            validate(read_checkpoint(path), CONFIG, "a model")


def test_mmcv_puts_the_weights_without_averaging_aside(tensors: Tensors, tmp_path: Path) -> None:
    from checkpoint_files import mmpretrain_keys

    model = mmpretrain_keys(tensors)
    aside = {f"ema_{name.replace('.', '_')}": value + 1 for name, value in model.items()}
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": model | aside}, path)
    averaged, raw = read_checkpoint(path), read_checkpoint(path, ModelChoices(averaged=False))
    assert torch.equal(averaged.tensors["head.bias"], tensors["head.bias"])
    assert torch.equal(raw.tensors["head.bias"], tensors["head.bias"] + 1)
    assert "--no-ema" in averaged.notes[0]


# --- pickles


class Trap:
    """Creates the file ``path`` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.open, (self.path, os.O_CREAT))


class Setter:
    """Changes a function that unpickling calls."""

    def __reduce__(self) -> tuple[object, ...]:
        return (torch._utils._rebuild_parameter, (), (None, {"_function": os.getcwd}))


def _zipped(content: object, path: Path) -> None:
    torch.save(content, path)


def _legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [_zipped, _legacy])
@pytest.mark.parametrize("place", ["beside", "inside", "optimizer", "key"])
def test_nothing_in_a_pickle_is_executed(
    write: Callable[[object, Path], None], place: str, tensors: Tensors, tmp_path: Path
) -> None:
    sprung = tmp_path / "sprung"
    trap: Any = Trap(sprung)
    content: Any = {
        "beside": {"state_dict": tensors, "args": argparse.Namespace(lr=1), "hook": trap},
        "inside": {"state_dict": tensors | {"head.bias": trap}},
        "optimizer": {"state_dict": tensors, "optimizer": [trap, {"a": trap}]},
        "key": {"state_dict": tensors, trap: 1},
    }[place]
    path = tmp_path / "weights.pth"
    write(content, path)
    if place == "inside":
        with pytest.raises(CheckpointError, match=r"not tensors: head\.bias"):
            read_checkpoint(path)
    else:
        assert torch.equal(read_checkpoint(path).tensors["head.bias"], tensors["head.bias"])
    assert not sprung.exists()
    # The trap works: Python's own unpickler springs it.
    pickle.loads(pickle.dumps(trap))
    assert sprung.exists()


def test_a_pickle_cannot_change_a_function(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors, "args": Setter()}, path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def _shifted(path: Path) -> None:
    """Claim more numbers for a tensor than its record has."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in records if name.endswith("data.pkl"))
    # BININT1 5 (the head bias's numbers) -> BININT1 255
    records[pickled] = records[pickled].replace(b"K\x05t", b"K\xfft")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def test_a_tensor_cannot_reach_beyond_its_record(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors, "args": argparse.Namespace()}, path)
    read_checkpoint(path)
    _shifted(path)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def _claims(path: Path, size: bytes) -> None:
    """Replace the head bias's size of 5 in a legacy file by another number."""
    data = path.read_bytes()
    # BININT1 0 (offset), BININT1 5, TUPLE1 (size)
    assert data.count(b"K\x00K\x05\x85") == 1
    path.write_bytes(data.replace(b"K\x00K\x05\x85", b"K\x00" + size + b"\x85"))


# LONG1 of 2**34 numbers, which would be 64 GiB; BININT1 6.
@pytest.mark.parametrize("size", [b"\x8a\x05" + (1 << 34).to_bytes(5, "little"), b"K\x06"])
def test_a_tensor_cannot_enlarge_its_storage(size: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    _legacy({"head.bias": torch.arange(5.0), "args": argparse.Namespace()}, path)
    assert torch.equal(read_pickle(path)["head.bias"], torch.arange(5.0))
    _claims(path, size)
    with pytest.raises(pickle.UnpicklingError, match="beyond its storage"):
        read_pickle(path)


class Ordered(OrderedDict[str, Any]):
    """Is pickled as an OrderedDict with attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), dict(self.__dict__), None, iter([(n, self[n]) for n in self])


@pytest.mark.parametrize("method", ["items", "get", "keys", "values"])
@pytest.mark.parametrize("beside", [{}, {"args": argparse.Namespace()}])
def test_a_pickle_cannot_replace_a_method(
    method: str, beside: dict[str, Any], tensors: Tensors, tmp_path: Path
) -> None:
    inner, path = Ordered(tensors), tmp_path / "weights.pth"
    outer = Ordered({"state_dict": inner, **beside})
    for each in (inner, outer):
        setattr(each, method, 5)
    torch.save(outer, path)
    assert read_checkpoint(path).tensors.keys() == tensors.keys()


def test_a_key_that_has_no_text_is_damage(tensors: Tensors, tmp_path: Path) -> None:
    # Python converts integers of up to 4300 digits to text.
    error = refusal({"state_dict": tensors, 10**5000: 1}, tmp_path)
    assert "cannot be read" in error.message


@pytest.mark.parametrize("part", ["mean", "std"])
def test_mean_and_std_are_dense(part: str, tensors: Tensors, tmp_path: Path) -> None:
    from checkpoint_files import mmpretrain_keys

    endless = torch.ones(1).expand(2**20, 2**20)
    for value in (endless, torch.ones(3, device="meta"), torch.ones(3).to_sparse()):
        stated = {"data_preprocessor.mean": torch.ones(3), "data_preprocessor.std": torch.ones(3)}
        content = mmpretrain_keys(tensors) | stated | {f"data_preprocessor.{part}": value}
        assert f"data_preprocessor.{part} is" in refusal(content, tmp_path).message


def test_a_compressed_record_is_refused(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors, "args": argparse.Namespace()}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


def test_an_index_cannot_lead_out_of_its_folder(tensors: Tensors, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"cls_token": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_checkpoint(index)
    index.write_text('{"weight_map": {"cls_token": "gone.safetensors"}}')
    with pytest.raises(FileError, match="gone"):
        read_checkpoint(index)
    for name in ("", "a\0b", "/etc/passwd", ".."):
        index.write_text(json.dumps({"weight_map": {"cls_token": name}}))
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_checkpoint(index)
    index.write_text("[[")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_checkpoint(index)


def test_a_tensor_is_taken_from_the_shard_that_the_index_names(
    tensors: Tensors, tmp_path: Path
) -> None:
    first, index = "norm.bias", tmp_path / "model.safetensors.index.json"
    rest = {name: value for name, value in tensors.items() if name != first}
    save_file({first: tensors[first]}, tmp_path / "a.safetensors")
    save_file(rest | {first: tensors[first] + 1}, tmp_path / "b.safetensors")
    places = dict.fromkeys(tensors, "b.safetensors")
    for shard, shift in (("a.safetensors", 0), ("b.safetensors", 1)):
        index.write_text(json.dumps({"weight_map": places | {first: shard}}))
        found = read_checkpoint(index).tensors
        assert torch.equal(found[first], tensors[first] + shift)
    index.write_text(json.dumps({"weight_map": places | {"head.bias": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"head\.bias.*its shard does not contain"):
        read_checkpoint(index)


def test_a_pickle_of_a_stream_is_inert(tensors: Tensors, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": tensors, "log": io.BytesIO(b"x"), "types": [int, print]}, path)
    assert read_checkpoint(path).classes == 5
