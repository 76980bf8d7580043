"""Write small checkpoints with the libraries that users train with, and the logits of each model.

    pip install torch timm transformers open_clip_torch lightning mmengine mmpretrain mmcv-lite
    python scripts/write_checkpoint_oracles.py tests/clipdeploy/models/data/oracles

The tests read these files without any of the libraries.  Every model has random weights on the
scale of trained ones, so that a wrong GELU, pooling, epsilon or token order changes the logits.
The weights are rounded to float16, in most files stored as such, and run in float32.

torchvision is imported by timm, open_clip and mmpretrain, but not used by these models: where it is
not installed, an empty stand-in takes its place in this process.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 8, 32, 2, 2, 5
EDGES = (16, 28, 32, 48)


class _Stand(types.ModuleType):
    """A module whose attributes are empty classes."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0.28.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__getattr__": lambda self, name: name})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stand(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__.startswith("torchvision.transforms"):
            names = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
            modes = type("InterpolationMode", (), {name: name.lower() for name in names})
            module.InterpolationMode = modes  # type: ignore[attr-defined]


def without_torchvision() -> None:
    """Replace torchvision by the stand-in if it is not installed."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        sys.meta_path.insert(0, _Finder())


def fill(module: nn.Module, seed: int) -> nn.Module:
    """Give the module weights on the scale of trained ones, rounded to float16."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.ndim >= 2 and not any(word in name for word in ("token", "pos", "class_emb")):
            noise *= value[0].numel() ** -0.5
        elif "gamma" in name or (("norm" in name or "ln" in name) and name.endswith("weight")):
            noise = 0.8 + 0.2 * noise
        else:
            noise *= 0.3 if value.ndim >= 2 else 0.1
        value.data = noise.half().float()
    return module.eval()


def images(edge: int) -> Tensor:
    """Two normalised images (2, 3, edge, edge), the same in every run."""
    pixels = np.random.default_rng(edge).standard_normal((2, 3, edge, edge)).astype(np.float16)
    return torch.from_numpy(pixels.astype(np.float32))


def logits(model: Callable[[Tensor], Any], edge: int = SIZE) -> Tensor:
    """The logits (2, CLASSES) of a library's model."""
    with torch.no_grad():
        found = model(images(edge))
    return getattr(found, "logits", found)


Oracles = dict[str, Tensor]


def timm_model(name: str = "vit_base_patch16_clip_224", seed: int = 1, **options: Any) -> nn.Module:
    """A timm model of that architecture in the size of this script."""
    import timm

    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH}
    more = {"num_heads": HEADS, "num_classes": CLASSES, "mlp_ratio": 2}
    model = timm.create_model(name, **(sizes | more | options))
    return fill(model, seed)


def write_timm(folder: Path) -> Oracles:
    """Flat, CheckpointSaver with EMA, hub folder, wrapped, as ViT-L/14, averaged, whole module."""
    from timm.models import save_for_hf
    from timm.utils import CheckpointSaver, ModelEmaV3

    made: Oracles = {}
    model = timm_model()
    torch.save(model.state_dict(), folder / "timm-flat.pth")
    made["timm-flat"] = logits(model)
    for edge in (16, 48):
        resized = timm_model()
        resized.set_input_size(img_size=edge)
        made[f"timm-flat-{edge}px"] = logits(resized, edge)
    ema = ModelEmaV3(model)
    fill(ema.module, 2)
    saver = CheckpointSaver(
        model.half(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model="vit_base_patch16_clip_224", lr=0.1, gp="token"),
        model_ema=ema,
        checkpoint_dir=str(folder),
    )
    made["timm-best-ema"] = logits(ema.module)
    ema.module.half()
    saver.save_checkpoint(epoch=3, metric=71.5)
    (folder / "model_best.pth.tar").rename(folder / "timm-best.pth.tar")
    for left in (*folder.glob("last*"), *folder.glob("checkpoint-*")):
        left.unlink()
    made["timm-best-raw"] = made["timm-flat"]
    quick = timm_model("vit_base_patch16_clip_quickgelu_224", 3, global_pool="avg", init_values=0.1)
    made["timm-hub"] = logits(quick)
    save_for_hf(quick.half(), folder / "timm-hub", safe_serialization=True)
    plain = timm_model("vit_small_patch16_224", 4, no_embed_class=True, qkv_bias=False)
    made["timm-plain"] = logits(plain)
    wrapped = nn.DataParallel(torch.compile(plain.half()))
    torch.save({"model": wrapped.state_dict(), "epoch": 2}, folder / "timm-plain.pth")
    large = timm_model("vit_large_patch14_clip_224", 7, img_size=28, patch_size=14, mlp_ratio=4)
    made["timm-large"] = logits(large, 28)
    torch.save(large.half().state_dict(), folder / "timm-large.pth")
    averaged = torch.optim.swa_utils.AveragedModel(timm_model(seed=5, mlp_ratio=1))
    made["torch-averaged"] = logits(averaged.module)
    torch.save(averaged.half().state_dict(), folder / "torch-averaged.pth")
    whole = timm_model(seed=6, mlp_ratio=1)
    made["timm-whole"] = logits(whole)
    torch.save(whole.half(), folder / "timm-whole.pth")
    return made


def write_transformers(folder: Path) -> Oracles:
    """Write save_pretrained folders, one of them in shards, and a state dict."""
    from transformers import (
        CLIPConfig,
        CLIPForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    made: Oracles = {}
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    names = {index: f"bird {index}" for index in range(CLASSES)}
    vit = fill(ViTForImageClassification(ViTConfig(**sizes, id2label=names)), 7)
    made["hf-vit"] = logits(vit)
    vit.half().save_pretrained(folder / "hf-vit", max_shard_size="20KB")
    torch.save(vit.state_dict(), folder / "hf-vit-state.bin")
    config = CLIPConfig(vision_config=sizes, num_labels=CLASSES)
    clip = fill(CLIPForImageClassification(config), 8)
    made["hf-clip"] = logits(clip)
    clip.half().save_pretrained(folder / "hf-clip")
    return made


class Tuned(nn.Module):
    """A CLIP with a linear head on the image features, as users write it."""

    def __init__(self, clip: nn.Module, features: int) -> None:
        super().__init__()
        self.clip = clip
        self.fc = nn.Linear(features, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """Images to logits."""
        return self.fc(self.clip.encode_image(pixels))


def write_open_clip(folder: Path) -> Oracles:
    """A whole CLIP with a head beside it, and an image tower with a head behind it."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, mlp_ratio=2, patch_size=PATCH,
        image_size=SIZE,
    )  # fmt: skip
    text = CLIPTextCfg(context_length=4, vocab_size=8, width=16, heads=2, layers=1)
    made: Oracles = {}
    tuned = fill(Tuned(CLIP(24, vision, text, quick_gelu=True), 24), 9)
    made["openai-head"] = logits(tuned)
    torch.save({"state_dict": tuned.half().state_dict()}, folder / "openai-head.pt")
    tower = CLIP(24, vision, text).visual
    both = fill(nn.Sequential(tower, nn.Linear(24, CLASSES)), 10)
    for value in both.parameters():
        value.data = value.data.bfloat16().float()
    made["open-clip-tower"] = logits(both)
    torch.save(both.bfloat16().state_dict(), folder / "open-clip-tower.pt")
    return made


def write_lightning(folder: Path) -> Oracles:
    """Write the checkpoint of a Lightning module after one step."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, args: argparse.Namespace) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = timm_model(seed=11)
            self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CLASSES))

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = torch.utils.data.TensorDataset(images(SIZE), torch.arange(2))
    trainer = lightning.Trainer(
        max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", enable_checkpointing=False,
    )  # fmt: skip
    module = Module(argparse.Namespace(lr=0.0, size=np.int64(SIZE)))
    trainer.fit(module, torch.utils.data.DataLoader(data))
    made = {"lightning": logits(module.model.eval())}
    module.half()
    trainer.save_checkpoint(folder / "lightning.ckpt")
    return made


def mm_model(seed: int, head: dict[str, Any], edge: int = SIZE, **options: Any) -> nn.Module:
    """Build an ImageClassifier of mmpretrain."""
    from mmpretrain.registry import MODELS

    arch = {
        "embed_dims": WIDTH,
        "num_layers": DEPTH,
        "num_heads": HEADS,
        "feedforward_channels": 2 * WIDTH,
    }
    backbone = {"type": "VisionTransformer", "arch": arch, "img_size": edge, "patch_size": PATCH}
    config = {
        "type": "ImageClassifier",
        "backbone": backbone | options,
        "head": {"num_classes": CLASSES, "in_channels": WIDTH} | head,
    }
    return fill(MODELS.build(config), seed)


def write_mmpretrain(folder: Path) -> Oracles:
    """Write a release, and a training checkpoint of mmengine with EMA."""
    import mmpretrain.models  # noqa: F401
    from mmengine.hooks import EMAHook
    from mmengine.logging import HistoryBuffer
    from mmengine.model import ExponentialMovingAverage
    from mmengine.runner import save_checkpoint

    made: Oracles = {}
    released = mm_model(12, {"type": "VisionTransformerClsHead"}, pre_norm=True)
    made["mm-release"] = logits(released)
    larger = mm_model(12, {"type": "VisionTransformerClsHead"}, edge=48, pre_norm=True)
    larger.load_state_dict(released.state_dict())
    made["mm-release-48px"] = logits(larger, 48)
    torch.save(
        {"state_dict": released.half().state_dict(), "meta": {"dataset_meta": None}},
        folder / "mm-release.pth",
    )
    options = {"out_type": "avg_featmap", "layer_scale_init_value": 0.1}
    trained = mm_model(13, {"type": "LinearClsHead"}, **options)
    hook = EMAHook()
    hook.ema_model = ExponentialMovingAverage(trained)
    fill(hook.ema_model.module, 14)
    made["mm-train-raw"] = logits(trained)
    made["mm-train-ema"] = logits(hook.ema_model.module)
    hook.ema_model.half()
    hub = {"log_scalars": {"train/loss": HistoryBuffer([1.0, 0.5], [1, 1])}, "runtime_info": {}}
    checkpoint = {
        "meta": {
            "mmengine_version": "0.10.7",
            "epoch": 3,
            "dataset_meta": {"classes": list("abcde")},
        },
        "state_dict": trained.half().state_dict(),
        "message_hub": hub,
        "optimizer": torch.optim.SGD(trained.parameters(), lr=0.1).state_dict(),
    }
    hook.before_save_checkpoint(None, checkpoint)
    save_checkpoint(checkpoint, str(folder / "mm-train.pth"))
    return made


def main() -> None:
    """Write everything into the folder given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # transformers works without torchvision, but not with the stand-in.
    made = write_transformers(folder)
    without_torchvision()
    for write in (write_timm, write_open_clip, write_lightning, write_mmpretrain):
        made |= write(folder)
    found = {name: value.numpy() for name, value in made.items()}
    inputs = {f"images-{edge}": images(edge).half().numpy() for edge in EDGES}
    np.savez_compressed(folder / "logits.npz", **found, **inputs)
    for name, value in found.items():
        print(f"{name}: largest logit {np.abs(value).max():.3f}")
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(json.dumps({"files": sum(path.is_file() for path in folder.rglob("*")), "bytes": total}))


if __name__ == "__main__":
    main()
