"""Makes a zero-shot classifier out of a CLIP and class texts, as a checkpoint file.

    t(c) = normalise(mean over the prompts p of class c of normalise(text(p)))
    logits = logit_scale * normalise(embed x) . t(c)

The head's weight is logit_scale * t, so a zero-shot classifier is a ViT with a projection
``embed``, an L2 normalisation and a linear head.  Source: openai/CLIP
``notebooks/Prompt_Engineering_for_ImageNet.ipynb``, open_clip ``zero_shot_classifier.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.files import atomic_path, file_errors
from clipdeploy.core.passport import ZeroShotOrigin
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.checkpoints.archive import METADATA_KEY
from clipdeploy.models.clip.embedding import with_unit_projection
from clipdeploy.models.clip.pair import ClipPair
from clipdeploy.models.clip.prompts import Prompts
from clipdeploy.models.clip.text import TextTower
from clipdeploy.models.clip.tokenizer import END, tokenize, vocabulary_hash

__all__ = ["class_embeddings", "write_zero_shot", "zero_shot_origin"]

# Prompts that go through the text tower together.
_BATCH = 128
_SHOWN = 3
Advance = Callable[[int], object]


def class_embeddings(
    text: TextTower, prompts: Prompts, advance: Advance = lambda count: None
) -> tuple[Tensor, tuple[str, ...]]:
    """The embedding of each class (classes, D) float32, of length 1, and the prompts that are cut.

    ``advance`` is called with the number of prompts done.

    Raises:
        CheckpointError: an embedding is not finite or has no length.
        UsageError: see :func:`clipdeploy.models.clip.tokenizer.tokenize`.
    """
    counts = [len(prompts.of_class(index)) for index in range(len(prompts.names))]
    texts = [prompt for index in range(len(counts)) for prompt in prompts.of_class(index)]
    tokens = tokenize(texts)
    ids = torch.from_numpy(tokens.ids)
    # Short ones together: a batch is as long as its longest text.
    lengths = (ids == END).int().argmax(dim=1) + 1
    order = lengths.argsort(stable=True)
    found = torch.empty(len(texts), text.proj.out_features)
    with torch.inference_mode():
        for start in range(0, len(texts), _BATCH):
            rows = order[start : start + _BATCH]
            found[rows] = F.normalize(text(ids[rows, : int(lengths[rows].max())]))
            advance(len(rows))
        means = torch.stack([each.mean(dim=0) for each in torch.split(found, counts)])
        lasting = means / means.norm(dim=1, keepdim=True)
    if not lasting.isfinite().all():
        broken = [
            name for name, row in zip(prompts.names, lasting, strict=True) if row.isnan().any()
        ]
        raise CheckpointError(
            f"the text tower gives no embedding for {', '.join(broken[:_SHOWN])}",
            hint="the weights of the text tower are damaged: download the checkpoint again",
        )
    return lasting, tuple(texts[row] for row in tokens.cut)


def _tensors(pair: ClipPair, classes: Tensor) -> dict[str, Tensor]:
    made = with_unit_projection(pair.image.tensors)
    made["head.weight"] = pair.logit_scale * classes
    made["head.bias"] = torch.zeros(len(classes))
    made["patches.weight"] = made.pop("patch_embed.proj.weight")
    return {name: value.contiguous() for name, value in made.items()}


def write_zero_shot(
    pair: ClipPair,
    prompts: Prompts,
    card: ModelCard,
    path: Path,
    origin: ZeroShotOrigin,
    advance: Advance = lambda count: None,
) -> tuple[str, ...]:
    """Write the zero-shot classifier to ``path``, a safetensors file; return the prompts cut.

    ``origin`` is stored with it, see :func:`zero_shot_origin`.

    Raises:
        FileError: the file cannot be written.
        CheckpointError, UsageError: see :func:`class_embeddings`.
    """
    from safetensors.torch import save_file

    embeddings, cut = class_embeddings(pair.text, prompts, advance)
    image = pair.image
    config = {
        "zero_shot": origin,
        "class_names": prompts.names,
        "gelu": image.choices.gelu,
        "eps": image.choices.eps or image.native_eps,
        "heads": card.heads,
        "preprocessing": image.preprocessing,
    }
    metadata = {METADATA_KEY: msgspec.json.encode(config).decode()}
    with atomic_path(path) as temporary, file_errors("write", path):
        save_file(_tensors(pair, embeddings), temporary, metadata)
    return cut


def zero_shot_origin(pair: ClipPair, prompts: Prompts) -> ZeroShotOrigin:
    """What a zero-shot classifier of these is made from."""
    return ZeroShotOrigin(
        checkpoint=str(pair.image.path.absolute()),
        sha256=pair.image.sha256,
        reading=pair.image.choices,
        templates=prompts.templates,
        prompts_sha256=prompts.sha256,
        tokenizer_sha256=vocabulary_hash(),
        logit_scale=pair.logit_scale,
    )
