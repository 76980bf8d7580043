"""Read checkpoint files into a state dict with timm's names, and check every tensor.

Two layouts are recognised by their keys: mmpretrain's (``backbone.layers.0.ln1.weight``) and timm's
(``blocks.0.norm1.weight``), as ``.safetensors``, ``.bin`` or ``.pth``, flat or nested under
``state_dict``/``model``, zip or legacy pickle, with or without a ``module.`` prefix.  Pickles are
always read with ``weights_only=True``.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clipdeploy.core.errors import CheckpointError, first_line
from clipdeploy.core.files import open_regular, sha256_file
from clipdeploy.core.interrupts import interrupts
from clipdeploy.models.vit import ViTConfig

__all__ = [
    "Checkpoint",
    "expected_shapes",
    "read_checkpoint",
    "resize_position_grid",
    "validate",
]

StateDict = dict[str, Tensor]

Rules = tuple[tuple[re.Pattern[str], str], ...]
_MMPRETRAIN: Rules = (
    (re.compile(r"^backbone\.patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"^backbone\.pre_norm\."), "norm_pre."),
    (re.compile(r"^backbone\.layers\.(\d+)\.ln([12])\."), r"blocks.\1.norm\2."),
    (re.compile(r"^backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\."), r"blocks.\1.mlp.fc1."),
    (re.compile(r"^backbone\.layers\.(\d+)\.ffn\.layers\.1\."), r"blocks.\1.mlp.fc2."),
    (re.compile(r"^backbone\.layers\.(\d+)\.attn\."), r"blocks.\1.attn."),
    (re.compile(r"^backbone\.ln1\."), "norm."),
    (re.compile(r"^head\.layers\.head\."), "head."),
    (re.compile(r"^backbone\."), ""),
)
_NO_RULES: Rules = ()
_LISTED = 6
# Keys of mmengine (dataset_meta), mmcv, torchvision and Hugging Face.
_CLASS_KEYS = ("classes", "CLASSES", "class_names", "class_to_idx", "id2label", "idx_to_class")
# Levels of nested dictionaries to unwrap; real checkpoints have two.
_MAX_LEVELS = 8
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# In PyTorch's messages: the class that it refuses to load.
_CLASS = re.compile(r"\bGLOBAL ([\w.]+)")
# In PyTorch's messages: the advice to load the file in the unsafe way.
_ADVICE = re.compile(r"weights[_ ]only", re.IGNORECASE)
# Errors whose message describes the file; the message of others describes PyTorch's code.
_FILE_ERRORS = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file's tensors, float32, under timm's names.

    ``class_names`` are the file's class names, unparsed; None if it has none.
    """

    path: Path
    sha256: str
    layout: str
    tensors: StateDict
    class_names: Any = None

    @property
    def classes(self) -> int | None:
        """The number of classes of the head, None if it has no valid head."""
        head = self.tensors.get("head.weight")
        return head.shape[0] if head is not None and head.ndim == 2 else None


def expected_shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """timm name -> shape of every tensor in a checkpoint of this geometry."""
    width, hidden = config.width, config.mlp_ratio * config.width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, config.tokens, width),
        "patch_embed.proj.weight": (width, 3, config.patch, config.patch),
        "norm_pre.weight": (width,),
        "norm_pre.bias": (width,),
    }
    linears = {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    for index in range(config.depth):
        for norm in ("norm1", "norm2"):
            for part in ("weight", "bias"):
                shapes[f"blocks.{index}.{norm}.{part}"] = (width,)
        for name, shape in linears.items():
            shapes[f"blocks.{index}.{name}.weight"] = shape
            shapes[f"blocks.{index}.{name}.bias"] = shape[:1]
    return shapes | {
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (config.classes, width),
        "head.bias": (config.classes,),
    }


def _load_pickle(path: Path) -> Any:
    # Only the zip format can be memory-mapped; legacy pickles raise RuntimeError for mmap=True.
    with path.open("rb") as stream:
        mappable = stream.read(4) == b"PK\x03\x04"
    with warnings.catch_warnings():
        # Warnings about sparse tensors, which are refused.
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            stop: list[BaseException] = []
            try:
                with interrupts(stop):
                    loaded = load_file(path)
            except SafetensorError as error:
                raise ValueError(str(error)) from error
            if stop:
                raise stop[0]
            return loaded
        return _load_pickle(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain tensor pickle: {_reason(error)}",
            hint="it is truncated or contains objects that could run code: save only its state "
            "dict, or use .safetensors",
        ) from error
    except Exception as error:  # unpickling arbitrary bytes can raise anything
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: {_reason(error)}",
            hint="the file is truncated or not a checkpoint: download it again",
        ) from error


def _reason(error: Exception) -> str:
    """PyTorch's reason, without its advice to load the file in the unsafe way."""
    text = str(error)
    if found := _CLASS.search(text):
        return f"it contains an object of {found[1]}"
    if "TorchScript" in text:
        return "it is a TorchScript archive"
    if _ADVICE.search(text):
        return "it contains other objects than tensors, or is damaged"
    if not isinstance(error, _FILE_ERRORS):
        return "it is damaged, or contains a dtype that the format does not support"
    # Only the first sentence: PyTorch appends advice.
    return first_line(error).split(". ")[0]


def _unwrap(loaded: Any, path: Path) -> tuple[StateDict, bool]:
    nested = False
    # Limited, because a pickled dictionary can contain itself.
    for _ in range(_MAX_LEVELS):
        if not isinstance(loaded, Mapping):
            break
        inner = next((loaded[k] for k in ("state_dict", "model") if k in loaded), None)
        if not isinstance(inner, Mapping):
            break
        loaded, nested = inner, True
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(
            f"{path} contains no state dict", hint="pass a checkpoint of mmpretrain or timm"
        )
    wrong = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(
            f"{path} contains entries that are not tensors: {_some(wrong)}",
            hint="save only the model's state dict",
        )
    tensors = {str(key): value for key, value in loaded.items()}
    unsupported = [
        f"{name} is {what}" for name, value in tensors.items() if (what := _unsupported(value))
    ]
    if unsupported:
        raise CheckpointError(
            f"{path} contains tensors that are not dense floating-point: {_some(unsupported)}",
            hint="save the weights as dense float32, float16, bfloat16 or float64; dequantise a "
            "quantised model first",
        )
    return tensors, nested


def _unsupported(tensor: Tensor) -> str:
    """Describe a tensor that cannot be cast to float32 without loss; empty if it can."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_quantized:
        return f"quantised {dtype}"
    if tensor.is_nested:
        return f"a nested tensor of {dtype}"
    if tensor.layout != torch.strided:
        return f"{str(tensor.layout).removeprefix('torch.')} {dtype}"
    if tensor.is_meta:
        return f"{dtype} without data (device meta)"
    if tensor.dtype not in _FLOATS:
        return dtype
    # Strides of 0 make a huge shape out of one number, which the cast would allocate.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{dtype} {tuple(tensor.shape)} with only {tensor.untyped_storage().nbytes()} bytes"
    return ""


def _class_names(loaded: Any) -> Any:
    """The class names in a training checkpoint, unparsed; None if there are none."""
    places = [loaded]
    for name in ("meta", "dataset_meta", "hyper_parameters"):
        places += [place[name] for place in places if isinstance(place, Mapping) and name in place]
    for place in places:
        for name in _CLASS_KEYS:
            if isinstance(place, Mapping) and (found := place.get(name)):
                # A tensor under such a key is not a list of names.
                return found if isinstance(found, Mapping | list | tuple) else None
    return None


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _canonical(tensors: StateDict, path: Path) -> tuple[str, StateDict]:
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if any(key.startswith("backbone.") for key in tensors):
        layout, rules = "mmpretrain", _MMPRETRAIN
    elif any(key.startswith("blocks.") for key in tensors):
        layout, rules = "timm", _NO_RULES
    else:
        raise CheckpointError(
            f"{path} has neither mmpretrain's nor timm's keys: {_some(tensors)}",
            hint="pass a ViT classifier of mmpretrain (backbone.layers...) or timm (blocks...)",
        )
    renamed: StateDict = {}
    for key, value in tensors.items():
        for pattern, replacement in rules:
            new, count = pattern.subn(replacement, key)
            if count:
                key = new
                break
        renamed[key] = value.float()
    return layout, renamed


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint file in any of the layouts and formats listed in this module.

    Raises:
        FileError: the file does not exist or cannot be opened.
        CheckpointError: it is truncated, unsafe to unpickle, has an unknown layout, or contains
            other tensors than dense float32, float16, bfloat16 or float64.
    """
    with open_regular(path):
        pass
    loaded = _load(path)
    tensors, nested = _unwrap(loaded, path)
    layout, canonical = _canonical(tensors, path)
    kind = path.suffix.lstrip(".") or "pickle"
    wrapping = "nested" if nested else "flat"
    return Checkpoint(
        path, sha256_file(path), f"{layout} ({wrapping} {kind})", canonical, _class_names(loaded)
    )


def validate(checkpoint: Checkpoint, config: ViTConfig, model: str) -> None:
    """Check a checkpoint's tensor names, shapes and values against a geometry.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong shape or not finite.
    """
    expected = expected_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing: {_some(missing)}")
    if extra := sorted(found.keys() - expected.keys()):
        problems.append(f"unexpected: {_some(extra)}")
    wrong = [
        f"{name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        problems.append(f"wrong shape: {_some(wrong)}")
    if problems:
        raise CheckpointError(
            f"{checkpoint.path} does not fit {model}: {'; '.join(problems)}",
            hint="pass the --model that this checkpoint was trained for",
        )
    broken = [name for name, tensor in checkpoint.tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{checkpoint.path} contains NaN or infinite values in {_some(broken)}",
            hint="the training diverged or the file is damaged: use another checkpoint",
        )


def resize_position_grid(position: Tensor, grid: int) -> Tensor:
    """Resample a position embedding (1, 1 + G * G, C) to (1, 1 + grid * grid, C).

    Bicubic, ``align_corners=False``, no antialiasing; the class token's row is unchanged.  Source:
    mmpretrain 1.2 ``models/utils/embed.py`` ``resize_pos_embed``.
    """
    side = round((position.shape[1] - 1) ** 0.5)
    token, patches = position[:, :1], position[:, 1:]
    planes = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([token, planes.flatten(2).transpose(1, 2)], dim=1)
