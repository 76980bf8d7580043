"""Zero-shot classifiers against what open_clip and transformers compute with the same weights.

Covers: clipdeploy/models/clip/pair.py, clipdeploy/models/clip/text.py,
    clipdeploy/models/checkpoints/layouts/zero_shot.py,
    clipdeploy/models/checkpoints/layouts/mmpretrain_clip.py, clipdeploy/models/hub.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import LIBRARIES, TOLERANCE, clip_tensors, error, oracles, write_clip
from safetensors.torch import load_file, save_file
from script_module import load_script
from torch import Tensor

from clipdeploy.core.errors import CheckpointError
from clipdeploy.core.passport import ModelChoices, Recipe
from clipdeploy.models.checkpoints import read_checkpoint
from clipdeploy.models.clip.pair import ClipPair, read_pair
from clipdeploy.models.clip.prompts import Prompts
from clipdeploy.models.clip.tokenizer import tokenize
from clipdeploy.models.clip.zero_shot import class_embeddings, write_zero_shot, zero_shot_origin
from clipdeploy.models.load import LoadedModel, WeightsChoice, card_for, load_model, reload_model

SCRIPT = load_script("write_clip_oracles")
PROMPTS = Prompts(SCRIPT.CLASSES, tuple((name,) for name in SCRIPT.CLASSES), SCRIPT.TEMPLATES)
ORACLES = oracles()
IMAGES = torch.from_numpy(ORACLES["images"].astype(np.float32))


def classifier(pair: ClipPair, path: Path, prompts: Prompts = PROMPTS) -> LoadedModel:
    """Write the zero-shot classifier and load it as the checkpoint that it is."""
    shape = replace(pair.image.shape, classes=len(prompts.names))
    card = card_for(replace(pair.image, shape=shape), WeightsChoice())
    write_zero_shot(pair, prompts, card, path, zero_shot_origin(pair, prompts))
    return load_model(card, WeightsChoice(path), Recipe())


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pair(library: str, tmp_path_factory: pytest.TempPathFactory) -> ClipPair:
    path = write_clip(library, tmp_path_factory.mktemp(library))
    return read_pair(path, LIBRARIES[library])


def test_the_texts_embeddings_are_those_of_the_library(library: str, pair: ClipPair) -> None:
    ids = torch.from_numpy(
        tokenize([each.format(SCRIPT.CLASSES[1]) for each in SCRIPT.TEMPLATES]).ids
    )
    expected = ORACLES[f"{library}-texts"]
    assert error(pair.text(ids), expected) < TOLERANCE
    # Tokens behind the end change nothing, those before it do.
    assert error(pair.text(ids[:, :20]), expected) < TOLERANCE
    assert error(pair.text(ids[:, [0, 2, 1, *range(3, 77)]]), expected) > 100 * TOLERANCE


def test_the_classes_are_those_of_the_library(library: str, pair: ClipPair) -> None:
    found, cut = class_embeddings(pair.text, PROMPTS)
    assert cut == ()
    assert error(found, ORACLES[f"{library}-classes"]) < TOLERANCE
    other = replace(PROMPTS, templates=PROMPTS.templates[:1])
    assert error(class_embeddings(pair.text, other)[0], ORACLES[f"{library}-classes"]) > 1e-2


def test_the_logits_are_those_of_the_library(library: str, pair: ClipPair, tmp_path: Path) -> None:
    model = classifier(pair, tmp_path / "made.safetensors")
    logits = model.module(IMAGES)
    assert error(logits, ORACLES[f"{library}-logits"]) < TOLERANCE
    again = reload_model(model.card, model.weights, model.recipe)
    assert torch.equal(again.module(IMAGES), logits)
    assert model.class_names == list(PROMPTS.names)
    origin = model.weights.zero_shot
    assert origin == zero_shot_origin(pair, PROMPTS)
    assert (
        model.card.name
        == "vit-p8-32px-w128-d2-h2" + ("-m256" if library == "transformers" else "") + "-e48"
    )


def test_a_wrong_gelu_is_visible(library: str, pair: ClipPair, tmp_path: Path) -> None:
    other = "quick" if library == "open_clip" else "erf"
    path = write_clip(library, tmp_path / library)
    wrong = classifier(read_pair(path, ModelChoices(gelu=other)), tmp_path / "made.safetensors")
    assert error(wrong.module(IMAGES), ORACLES[f"{library}-logits"]) > 10 * TOLERANCE


def test_embeddings_have_length_1_on_average(pair: ClipPair, tmp_path: Path) -> None:
    """Else the sum of squares could leave FP16's range."""
    module = classifier(pair, tmp_path / "made.safetensors").module
    inputs = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    lengths = module.embed(module.norm(inputs)).norm(dim=1)
    assert 0.8 < float(lengths.mean()) < 1.2


def test_prompts_that_are_too_long_are_named(pair: ClipPair) -> None:
    long = replace(PROMPTS, texts=(("shark " * 80,), *PROMPTS.texts[1:]))
    _, cut = class_embeddings(pair.text, long)
    assert len(cut) == len(PROMPTS.templates)
    assert cut[0].startswith("a photo of a shark shark")


def written_anew(folder: Path, config: dict[str, Any] | None = None, **extra: Tensor) -> Path:
    """transformers' CLIP with another ``config.json``, and with more tensors."""
    path = write_clip("transformers", folder)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | extra, path / "model.safetensors")
    return path


def test_files_of_older_transformers_have_position_ids(tmp_path: Path) -> None:
    """As openai/clip-vit-base-patch16's on the hub."""
    names = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")
    path = written_anew(tmp_path, **{name: torch.arange(77)[None] for name in names})
    found, _ = class_embeddings(read_pair(path).text, PROMPTS)
    assert error(found, ORACLES["transformers-classes"]) < TOLERANCE


def test_a_configuration_may_leave_out_defaults(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2}
    short = {"model_type": "clip", "vision_config": heads, "text_config": heads}
    pair = read_pair(written_anew(tmp_path / "short", short))
    assert (
        error(class_embeddings(pair.text, PROMPTS)[0], ORACLES["transformers-classes"]) < TOLERANCE
    )
    assert pair.image.choices.gelu == "quick"
    # Without the number of heads it is transformers' default, which is not that of this width.
    bare = {"model_type": "clip", "vision_config": {}, "text_config": {}}
    pair = read_pair(written_anew(tmp_path / "bare", bare))
    assert pair.image.shape.heads == 12
    assert pair.text.blocks[0].attn.heads == 8


def test_the_towers_may_have_different_gelus(tmp_path: Path) -> None:
    vision = {"hidden_act": "quick_gelu", "num_attention_heads": 2}
    config = {"vision_config": vision, "text_config": vision | {"hidden_act": "gelu"}}
    pair = read_pair(written_anew(tmp_path, config))
    assert pair.image.choices.gelu == "quick"
    assert error(class_embeddings(pair.text, PROMPTS)[0], ORACLES["transformers-classes"]) > 1e-3


def test_a_training_checkpoint_of_open_clip(tmp_path: Path) -> None:
    """Nested, behind DistributedDataParallel's prefix, with the optimizer's state."""
    inside = {f"module.{name}": value for name, value in clip_tensors("open_clip").items()}
    state = {"epoch": 3, "name": "run", "state_dict": inside, "optimizer": {"state": {}}}
    torch.save(state, tmp_path / "epoch_3.pt")
    pair = read_pair(tmp_path / "epoch_3.pt", ModelChoices(gelu="erf"))
    assert error(class_embeddings(pair.text, PROMPTS)[0], ORACLES["open_clip-classes"]) < TOLERANCE


# --- open_clip's configuration

OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
        "text_cfg": {"width": 128, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
}


def open_clip_folder(folder: Path, **model: Any) -> Path:
    """A folder as ``save_for_hf`` of open_clip writes it; ``model`` changes its model_cfg."""
    folder.mkdir()
    tensors = {name: value.contiguous() for name, value in clip_tensors("open_clip").items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = {**OPEN_CLIP_CONFIG, "model_cfg": {**OPEN_CLIP_CONFIG["model_cfg"], **model}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    # Repositories have transformers' files as well; these are of other weights.
    (folder / "config.json").write_text('{"hidden_act": "quick_gelu"}')
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.1, 0.1]}')
    return folder


def test_open_clips_configuration_tells_gelu_heads_and_preprocessing(tmp_path: Path) -> None:
    pair = read_pair(open_clip_folder(tmp_path / "hub"))
    assert error(class_embeddings(pair.text, PROMPTS)[0], ORACLES["open_clip-classes"]) < TOLERANCE
    assert (pair.image.choices.gelu, pair.image.shape.heads) == ("erf", 2)
    stated = pair.image.preprocessing
    assert stated is not None
    assert (stated.mean, stated.std) == ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert (stated.crop_pct, stated.crop_mode) == (1.0, "center")
    quick = read_pair(open_clip_folder(tmp_path / "quick", quick_gelu=True))
    assert quick.image.choices.gelu == "quick"
    assert error(class_embeddings(quick.text, PROMPTS)[0], ORACLES["open_clip-classes"]) > 1e-3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"text_cfg": {"no_causal_mask": True}}, "no_causal_mask True in text_cfg"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type 'avg' in vision_cfg"),
        ({"vision_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs .* in vision_cfg"),
    ],
)
def test_other_towers_of_open_clip_are_refused(
    model: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pair(open_clip_folder(tmp_path / "hub", **model))


# --- mmpretrain's CLIPZeroShot


def of_mmpretrain() -> dict[str, Tensor]:
    """OpenAI's tensors as mmpretrain's openai-clip_to_mmpretrain-clip.py names and shapes them."""
    names = (
        ("visual.transformer.resblocks", "visual.layers"),
        ("ln_1", "ln1"),
        ("ln_2", "ln2"),
        ("mlp.c_fc", "ffn.layers.0.0"),
        ("mlp.c_proj", "ffn.layers.1"),
        ("in_proj_", "qkv."),
        ("out_proj", "proj"),
        ("visual.conv1", "visual.patch_embed.projection"),
        ("visual.positional_embedding", "visual.pos_embed"),
        ("visual.class_embedding", "visual.cls_token"),
        ("visual.ln_pre", "visual.pre_norm"),
        ("visual.ln_post", "visual.ln1"),
    )
    made = {}
    for name, value in clip_tensors("openai").items():
        new, tensor = name, value
        if name == "visual.proj":
            new = "visual_proj.proj"
        elif name.startswith("visual."):
            for old, other in names:
                new = new.replace(old, other)
        if new == "visual.pos_embed":
            tensor = value[None]
        if new == "visual.cls_token":
            tensor = value[None, None]
        made[new] = tensor
    return made


def test_mmpretrains_clip_gives_openais_logits(tmp_path: Path) -> None:
    path = tmp_path / "clip-vit-base-p16.pth"
    torch.save(of_mmpretrain(), path)
    model = classifier(read_pair(path), tmp_path / "made.safetensors")
    with torch.no_grad():
        assert error(model.module(IMAGES), ORACLES["openai-logits"]) < TOLERANCE
        erf = classifier(read_pair(path, ModelChoices(gelu="erf")), tmp_path / "erf.safetensors")
        assert error(erf.module(IMAGES), ORACLES["openai-logits"]) > 1e-3
    # As mmengine saves it while training.
    torch.save({"meta": {}, "state_dict": of_mmpretrain(), "message_hub": {}}, path)
    assert read_pair(path).image.layout.startswith("mmpretrain CLIP (nested")


def test_mmpretrains_clip_without_its_towers_or_projection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.pth"
    torch.save(of_mmpretrain(), path)
    with pytest.raises(CheckpointError, match="CLIP without a classification head"):
        read_checkpoint(path)
    for name in ("visual_proj.proj", "text_projection"):
        torch.save({n: v for n, v in of_mmpretrain().items() if n != name}, path)
        with pytest.raises(CheckpointError, match=r"no visual projection|lacks tensors"):
            read_pair(path)


def without(*names: str) -> dict[str, Tensor]:
    return {name: value for name, value in clip_tensors("open_clip").items() if name not in names}


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return clip_tensors("open_clip") | {name: value}


BLOCK = "transformer.resblocks.1.mlp.c_fc.weight"
FAULTS: dict[str, tuple[dict[str, Tensor], str]] = {
    "no text tower": (without("token_embedding.weight"), "no text tower"),
    "no logit scale": (without("logit_scale"), "no logit_scale"),
    "no projection": (without("visual.proj"), "no visual projection"),
    "a block's tensor missing": (without(BLOCK), "mlp.fc1.weight"),
    "another tokenizer": (
        changed("token_embedding.weight", torch.zeros(32_000, 128)),
        "another tokenizer",
    ),
    "another text tower": (changed("text_projection", torch.zeros(128, 64)), "do not belong"),
    "another kind of tower": (changed("text_decoder.weight", torch.zeros(2, 2)), "neither tower"),
    "not finite": (changed("ln_final.bias", torch.full((128,), torch.nan)), "NaN"),
    "a logit scale of a million": (changed("logit_scale", torch.tensor(14.0)), "logit scale"),
    "a head": (changed("visual.head.weight", torch.zeros(5, 128)), "neither tower"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_clip_is_refused(fault: str, tmp_path: Path) -> None:
    tensors, message = FAULTS[fault]
    path = write_clip("open_clip", tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        read_pair(path, ModelChoices(gelu="erf"))


@pytest.mark.parametrize("each", LIBRARIES)
def test_a_clip_that_is_taken_for_a_classifier_names_the_option(each: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="CLIP without a classification head") as caught:
        read_checkpoint(write_clip(each, tmp_path), LIBRARIES[each])
    assert "--zero-shot" in caught.value.hint


def test_a_damaged_classifier_is_refused(tmp_path: Path) -> None:
    pair = read_pair(write_clip("openai", tmp_path))
    path = tmp_path / "made.safetensors"
    card = classifier(pair, path).card
    for metadata, message in (
        ({}, "does not say what"),
        ({"clipdeploy": "{"}, "damaged metadata"),
        ({"clipdeploy": '{"gelu": "quick", "zero_shot": {"sha256": 3}}'}, "does not say what"),
    ):
        save_file(load_file(path), tmp_path / "other.safetensors", metadata)
        with pytest.raises(CheckpointError, match=f"{message}|--gelu|GELU"):
            load_model(card, WeightsChoice(tmp_path / "other.safetensors"), Recipe())
