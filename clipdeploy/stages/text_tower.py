"""Exports the text tower of an embedding model to an FP32 graph and checks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from clipdeploy.core.display import Renderable, Shown, facts
from clipdeploy.core.errors import UsageError
from clipdeploy.core.passport import (
    CONTEXT,
    LOGIT_SCALE_KEY,
    TOKENIZER_KEY,
    TOKENS,
    Passport,
    Recipe,
    TensorSpec,
    settings_of,
)
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.passport import library_versions
from clipdeploy.models import cards
from clipdeploy.models.clip.tokenizer import vocabulary_hash
from clipdeploy.models.load import LoadedText, WeightsChoice, reload_text
from clipdeploy.stages.export import export_model
from clipdeploy.stages.samples import sample_texts
from clipdeploy.workspace.folder import Workspace
from exporters.headers import GraphArtifact, existing_graph
from exporters.onnx import ExportConfig, export_graph

__all__ = ["ExportedTowers", "export_towers"]


@dataclass(frozen=True)
class ExportedTowers(Shown):
    """The FP32 graphs of an embedding model: of images and of texts."""

    image: GraphArtifact
    text: GraphArtifact

    def __rich__(self) -> Renderable:
        rows = (
            (tower, f"{made.path}: {made.nodes} nodes, {made.bytes / 1e6:.1f} MB")
            for tower, made in (("images", self.image), ("texts", self.text))
        )
        return facts(list(rows))


def export_towers(
    workspace: Workspace,
    name: str | None,
    weights: WeightsChoice = WeightsChoice(),
    recipe: Recipe = Recipe(),
    config: ExportConfig = ExportConfig(),
    *,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> ExportedTowers:
    """Export both towers of a CLIP: images as :func:`clipdeploy.stages.export.export_model`, texts.

    The text tower takes the ids of 77 tokens, int32, and gives embeddings of the same kind as the
    image tower's; ``config.preprocess`` is for images.

    Raises:
        UsageError: the model gives no embeddings, or its weights are random.
        ClipdeployError: see :mod:`clipdeploy.core.errors`; no file is left behind.
    """
    _check_embeds(name, weights)
    made = export_model(
        workspace, name, weights, recipe, config, force=force, note=note, progress=progress
    )
    image = made.passport
    path = workspace.graph(image.model, "fp32", "text")
    with progress.task(f"load the text tower of {image.model}"):
        text = reload_text(image.weights, cards.find(image.model).embedding or "raw")
    config = replace(config, preprocess=False)
    passport = _passport(image, text, config)
    found = existing_graph(path)
    if found and not force and _same(found.passport, passport):
        return ExportedTowers(made, found)
    graph = export_graph(
        text.module, path, passport, sample_texts(), config, progress, release=True
    )
    return ExportedTowers(made, graph)


def _check_embeds(name: str | None, weights: WeightsChoice) -> None:
    """Refuse a model that gives logits, before it is exported."""
    if weights.random_seed is not None:
        raise UsageError("random weights have no text tower", hint="leave out --text-tower")
    known = None if name is None or "/" in name else cards.find(name)
    if weights.embedding is None and (known is None or known.embedding is None):
        raise UsageError(
            f"{known.name if known else 'the model'} gives logits, and has no text tower",
            hint="export CLIP with --embeddings, or leave out --text-tower",
        )


def _passport(image: Passport, text: LoadedText, config: ExportConfig) -> Passport:
    return replace(
        image,
        input=TensorSpec(TOKENS, "int32", ("batch", CONTEXT)),
        output=TensorSpec("embedding", "float32", ("batch", image.classes)),
        parents={},
        settings={
            **settings_of(config),
            LOGIT_SCALE_KEY: text.logit_scale,
            TOKENIZER_KEY: vocabulary_hash(),
        },
        versions=library_versions(),
        tower="text",
    )


def _same(found: Passport, wanted: Passport) -> bool:
    return (found.weights.identity, found.recipe, found.settings, found.versions) == (
        *(wanted.weights.identity, wanted.recipe, wanted.settings, wanted.versions),
    )
