"""Train the demo's CLIP: the demo's image tower, and a small text tower that names its digits.

    python scripts/train_demo_clip.py [--steps 600]

Writes ``clipdeploy/data/demo/clip``: both towers in transformers' layout (``CLIPModel``, float16),
``digits.txt`` and ``README.md``.  The image tower is that of ``weights.safetensors``, without its
head; the text tower and both projections are trained on the images of ``train_demo_checkpoint.py``
and on captions in five languages.  Rows of the token table that no caption uses stay zero.  The
test images give only the final accuracy, which must be at least 97 %.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from train_demo_checkpoint import FOLDER, REQUIRED_TOP1, SEED, augment, pixels, read_digits, split

from clipdeploy.core.passport import Recipe
from clipdeploy.models import cards
from clipdeploy.models.clip.text import TextGeometry, TextTower
from clipdeploy.models.clip.tokenizer import VOCABULARY, tokenize
from clipdeploy.models.load import WeightsChoice, load_model
from clipdeploy.models.vit import BlockConfig, VisionTransformer

WIDTH, HEADS, DEPTH, EMBED = 32, 2, 2, 32
VIEWS, BATCH = 8, 100
# Of each digit: English, the numeral, German, French, Spanish, Italian.
WORDS = (
    ("zero", "0", "null", "zéro", "cero", "zero"),
    ("one", "1", "eins", "un", "uno", "uno"),
    ("two", "2", "zwei", "deux", "dos", "due"),
    ("three", "3", "drei", "trois", "tres", "tre"),
    ("four", "4", "vier", "quatre", "cuatro", "quattro"),
    ("five", "5", "fünf", "cinq", "cinco", "cinque"),
    ("six", "6", "sechs", "six", "seis", "sei"),
    ("seven", "7", "sieben", "sept", "siete", "sette"),
    ("eight", "8", "acht", "huit", "ocho", "otto"),
    ("nine", "9", "neun", "neuf", "nueve", "nove"),
)
TEMPLATES = ("a photo of the digit {}.", "the handwritten number {}.", "a drawing of a {}.", "{}")

README = """# The demo's CLIP

- `model.safetensors`, `config.json`: a CLIP in the layout of transformers, trained by
  `scripts/train_demo_clip.py`; zero-shot top-1 on `test.zip` with `digits.txt` and `templates.txt`:
  {top1:.2f} %. Its image tower is that of the demo card.
- `digits.txt`: the ten classes with their words in five languages; `templates.txt`: the captions.
"""


def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """What the head reads (N, width): the class token behind the last LayerNorm."""
    found: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    with torch.inference_mode():
        for part in images.split(256):
            model(part)
    hook.remove()
    return torch.cat(found).clone()


def new_text() -> TextTower:
    """A text tower with seeded weights; its tokens have the scale of trained ones."""
    torch.manual_seed(SEED)
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, 1e-5, "erf")
    text = TextTower(TextGeometry(block, DEPTH, EMBED))
    nn.init.normal_(text.token_embed, std=0.3)
    nn.init.normal_(text.position, std=0.1)
    return text


def captions() -> tuple[Tensor, Tensor]:
    """The ids of all captions (10 * words * templates, T), and the digit of each."""
    texts = [(t.format(w), d) for d, words in enumerate(WORDS) for w in words for t in TEMPLATES]
    ids = torch.from_numpy(tokenize([text for text, _ in texts]).ids)
    length = int((ids != 0).sum(dim=1).max())
    return ids[:, :length], torch.tensor([digit for _, digit in texts])


def train(inputs: Tensor, labels: Tensor, steps: int) -> tuple[TextTower, Tensor, Tensor]:
    """Train the text tower, the visual projection (EMBED, width) and the logit scale.

    The loss is CLIP's, of images with captions; a batch has several of each digit, all of which are
    right for each other.
    """
    text, ids = new_text(), captions()
    project = nn.Linear(inputs.shape[1], EMBED, bias=False)
    scale = nn.Parameter(torch.tensor(10.0).log())
    weights = [*text.parameters(), *project.parameters(), scale]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        said = torch.randint(len(ids[0]), (BATCH,), generator=generator)
        image, words = F.normalize(project(inputs[chosen])), F.normalize(text(ids[0][said]))
        logits = scale.exp().clamp(max=100) * image @ words.T
        same = (labels[chosen][:, None] == ids[1][said]).float()
        loss = both_ways(logits, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss:.3f}, scale {scale.exp():.1f}", flush=True)
    return text.eval(), project.weight.detach(), scale.detach().clamp(max=np.log(100))


def both_ways(logits: Tensor, same: Tensor) -> Tensor:
    """Cross entropy of images over captions and of captions over images."""
    losses = []
    for scores, right in ((logits, same), (logits.T, same.T)):
        share = right / right.sum(dim=1, keepdim=True).clamp(min=1)
        losses.append(-(share * scores.log_softmax(dim=1)).sum(dim=1).mean())
    return (losses[0] + losses[1]) / 2


def vision_tensors(model: VisionTransformer, projection: Tensor) -> dict[str, Tensor]:
    """The image tower under the names of transformers."""
    state = model.state_dict()
    made = {
        "vision_model.embeddings.class_embedding": torch.zeros(projection.shape[1]),
        "vision_model.embeddings.position_embedding.weight": state["position"][0],
        "vision_model.embeddings.patch_embedding.weight": state["patch_embed.weight"],
        "visual_projection.weight": projection,
    }
    for ours, theirs in (("norm_pre", "pre_layrnorm"), ("norm", "post_layernorm")):
        for end in ("weight", "bias"):
            made[f"vision_model.{theirs}.{end}"] = state[f"{ours}.{end}"]
    return made | blocks(model.blocks, "vision_model")


def text_tensors(text: TextTower) -> dict[str, Tensor]:
    """The text tower under the names of transformers; unused tokens are zero."""
    used = torch.zeros(VOCABULARY, 1)
    used[captions()[0].unique()] = 1
    made = {
        "text_model.embeddings.token_embedding.weight": text.token_embed * used,
        "text_model.embeddings.position_embedding.weight": text.position,
        "text_model.final_layer_norm.weight": text.norm.weight,
        "text_model.final_layer_norm.bias": text.norm.bias,
        "text_projection.weight": text.proj.weight,
    }
    return made | blocks(text.blocks, "text_model")


def blocks(modules: nn.ModuleList, tower: str) -> dict[str, Tensor]:
    """The blocks of a tower under the names of transformers."""
    made = {}
    for index, block in enumerate(modules):
        stem = f"{tower}.encoder.layers.{index}."
        for name, value in block.state_dict().items():
            part, end = name.rsplit(".", 1)
            if part == "attn.qkv":
                for letter, third in zip("qkv", value.chunk(3), strict=True):
                    made[f"{stem}self_attn.{letter}_proj.{end}"] = third
                continue
            names = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1"}
            made[f"{stem}{(names | {'norm2': 'layer_norm2'}).get(part, part)}.{end}"] = value
    return made


def config(card: cards.ModelCard) -> dict[str, object]:
    """The parts of a transformers config.json that the tensors do not tell."""
    common = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision = {"num_attention_heads": card.heads, "image_size": card.image_size}
    return {
        "architectures": ["CLIPModel"],
        "projection_dim": EMBED,
        "text_config": common | {"num_attention_heads": HEADS},
        "vision_config": common | vision | {"patch_size": card.patch},
    }


def top1(text: TextTower, projection: Tensor, inputs: Tensor, labels: Tensor) -> float:
    """Zero-shot top-1 in percent, with all captions."""
    ids, digits = captions()
    with torch.inference_mode():
        found = F.normalize(text(ids))
        classes = F.normalize(torch.stack([found[digits == d].mean(dim=0) for d in range(10)]))
        answers = (F.normalize(inputs @ projection.T) @ classes.T).argmax(dim=1)
    return 100 * float((answers == labels).float().mean())


def main() -> int:
    """Train, evaluate and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    model = load_model(cards.find(cards.DEMO), WeightsChoice(), Recipe())
    spec = model.card.preprocess(Recipe())
    training, _, test = split(read_digits())
    images, labels = pixels(training, spec), torch.from_numpy(training.labels)
    views = torch.cat([features(model.module, augment(images)) for _ in range(VIEWS)])
    text, projection, scale = train(views, labels.repeat(VIEWS), steps)
    held_out = features(model.module, pixels(test, spec))
    score = top1(text, projection, held_out, torch.from_numpy(test.labels))
    print(f"zero-shot top-1 on {len(test.labels)} held-out digits: {score:.2f} %")
    if score < REQUIRED_TOP1:
        print(f"below the required {REQUIRED_TOP1} %: nothing written", file=sys.stderr)
        return 1
    tensors = vision_tensors(model.module, projection) | text_tensors(text)
    half = {n: v.detach().half().contiguous() for n, v in sorted(tensors.items())}
    folder = FOLDER / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(half | {"logit_scale": scale}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(model.card), indent=2) + "\n")
    lines = ["\t".join((str(d), *dict.fromkeys(words))) for d, words in enumerate(WORDS)]
    (folder / "digits.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (folder / "README.md").write_text(README.format(top1=score))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
