"""Write what open_clip and transformers compute with small CLIPs, as data for the tests.

    pip install torch transformers open_clip_torch ftfy
    python scripts/write_clip_oracles.py tests/clipdeploy/models/clip/data

The weights are not stored: ``shapes.json`` lists names and shapes in order, and the tests draw the
same weights (``fill`` in ``write_checkpoint_oracles.py``).  ``oracles.npz`` has, for each library,
the embeddings of images and texts, the zero-shot logits, and hashes of the tokenizer's ids for
10,000 strings.  torchvision is treated as in ``write_checkpoint_oracles.py``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from write_checkpoint_oracles import fill, images, without_torchvision

SIZE, PATCH, WIDTH, DEPTH, EMBED = 32, 8, 128, 2, 48
CLASSES = ("tench", "great white shark", "numeral seven")
TEMPLATES = ("a photo of a {}.", "itap of the large {}.", "{}")
STRINGS, GROUP = 10_000, 100


def strings() -> list[str]:
    """Seeded texts of letters of many scripts, HTML entities, damaged encodings and long lines."""
    random = np.random.default_rng(0)
    odd = ["&amp;", "&lt;b&gt;", "&#39;", "&amp;quot;", "&eacute;", "\xe2\u20ac\u2122", "\xc3\xa9"]
    odd += ["it's", "WE'VE", "12345", "3rd", "\t", "\n", "\u03a3\u0391\u03a3", "\u0130", "\ufb01"]
    spans = [(32, 127), (0xA0, 0x250), (0x370, 0x590), (0x600, 0x700), (0x900, 0xA00)]
    spans += [(0x3040, 0x3100), (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F700)]
    spans += [(0x2000, 0x2300), (0x10000, 0x1F000)]
    made = []
    for _ in range(STRINGS):
        parts = []
        for _ in range(int(random.integers(1, 25))):
            if random.random() < 0.3:
                parts.append(odd[random.integers(len(odd))])
            else:
                low, high = spans[random.integers(len(spans))]
                codes = random.integers(low, high, int(random.integers(1, 8)))
                parts.append("".join(map(chr, codes)))
        made.append(("" if random.random() < 0.5 else " ").join(parts))
    return made


def open_clip_model(*, quick: bool, seed: int) -> nn.Module:
    """A small CLIP of open_clip; with QuickGELU its state dict is that of OpenAI's archives."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=DEPTH, width=WIDTH, head_width=64, patch_size=PATCH, image_size=SIZE
    )
    text = CLIPTextCfg(width=WIDTH, heads=2, layers=DEPTH)
    return fill(CLIP(EMBED, vision, text, quick_gelu=quick), seed)


def transformers_model(seed: int) -> nn.Module:
    """A small CLIPModel."""
    from transformers import CLIPConfig, CLIPModel

    common = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "hidden_act": "quick_gelu",
    }
    vision = common | {"image_size": SIZE, "patch_size": PATCH}
    text = common | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED)
    return fill(CLIPModel(config), seed)


def scaled(model: nn.Module) -> nn.Module:
    """The model with a logit scale of 50."""
    model.logit_scale.data = torch.tensor(50.0).log()
    return model


def zero_shot(image: Tensor, encode: Any, scale: float) -> tuple[Tensor, Tensor]:
    """The classes' embeddings, as open_clip's zero_shot_classifier.py, and the logits."""
    means = [
        F.normalize(encode([each.format(name) for each in TEMPLATES])).mean(dim=0)
        for name in CLASSES
    ]
    classes = F.normalize(torch.stack(means))
    return classes, scale * F.normalize(image) @ classes.T


def main() -> None:
    """Write ``shapes.json`` and ``oracles.npz`` into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    # transformers works without torchvision, but not with the stand-in.
    hugging = scaled(transformers_model(3))
    models = {"transformers": hugging}
    without_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    models |= {
        "open_clip": scaled(open_clip_model(quick=False, seed=4)),
        "openai": scaled(open_clip_model(quick=True, seed=5)),
    }
    for name, model in models.items():
        hugged = name == "transformers"
        shapes[name] = [[n, list(v.shape)] for n, v in model.named_parameters()]

        def encode(texts: list[str], model: Any = model, hugged: bool = hugged) -> Tensor:
            ids = tokenizer(texts)
            if not hugged:
                return model.encode_text(ids)
            found = model.get_text_features(input_ids=ids)
            return getattr(found, "pooler_output", found)

        with torch.no_grad():
            encode_image = model.get_image_features if hugged else model.encode_image
            found = encode_image(images(SIZE))
            image = getattr(found, "pooler_output", found)
            classes, logits = zero_shot(image, encode, float(model.logit_scale.exp()))
        texts = [each.format(CLASSES[1]) for each in TEMPLATES]
        with torch.no_grad():
            made[f"{name}-texts"] = encode(texts).numpy()
        made[f"{name}-image"] = image.numpy()
        made[f"{name}-classes"], made[f"{name}-logits"] = classes.numpy(), logits.numpy()
    ids = tokenizer(strings()).numpy().astype(np.int32)
    groups = [
        hashlib.sha256(ids[start : start + GROUP].tobytes()).hexdigest()
        for start in range(0, STRINGS, GROUP)
    ]
    made["images"] = images(SIZE).numpy().astype(np.float16)
    shapes["tokens"] = groups
    (folder / "shapes.json").write_text(json.dumps(shapes, indent=1) + "\n")
    np.savez_compressed(folder / "oracles.npz", **made)


if __name__ == "__main__":
    main()
