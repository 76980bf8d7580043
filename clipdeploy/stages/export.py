"""Checkpoint -> checked FP32 graph."""

from __future__ import annotations

from collections.abc import Callable

from clipdeploy import zoo
from clipdeploy.engines.passport import library_versions
from clipdeploy.model import LoadedModel, WeightsChoice, load_model
from clipdeploy.stages.class_names import ClassNames, name_classes
from clipdeploy.stages.samples import sample_images
from clipdeploy.workspace import Workspace
from exporters.artifact import Passport, Recipe, TensorSpec, settings_of
from exporters.headers import GraphArtifact, existing_graph
from exporters.onnx import ExportConfig, export_graph
from exporters.progress import SILENT, Progress

__all__ = ["export_model"]


def _passport(model: LoadedModel, named: ClassNames) -> Passport:
    size = model.card.image_size
    classes = model.module.config.classes
    return Passport(
        kind="graph",
        model=model.card.name,
        precision="fp32",
        weights=model.weights,
        recipe=model.recipe,
        preprocess=model.card.preprocess(model.recipe),
        input=TensorSpec("image", "float32", ("batch", 3, size, size)),
        output=TensorSpec("logits", "float32", ("batch", classes)),
        classes=classes,
        class_names=named.names,
        class_names_from=named.source,
        versions=library_versions(),
    )


def export_model(
    workspace: Workspace,
    name: str,
    weights: WeightsChoice = WeightsChoice(),
    recipe: Recipe = Recipe(),
    config: ExportConfig = ExportConfig(),
    *,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> GraphArtifact:
    """Checkpoint -> checked FP32 graph in the workspace.

    ``note`` is told where the names of the classes come from, if they may be the wrong ones.

    Raises:
        ClipdeployError: see :mod:`exporters.errors`; nothing is left behind.
    """
    card = zoo.find(name)
    with progress.task(f"load {card.name}"):
        model = load_model(card, weights, recipe)
    path = workspace.graph(card.name, "fp32")
    found = existing_graph(path)
    named = name_classes(model, weights, found.passport if found else None)
    if named.doubt:
        note(named.doubt)
    passport = _passport(model, named)
    settings = settings_of(config)
    if found and not force:
        old = found.passport
        same = (
            (old.weights.identity, old.recipe, old.settings, old.versions, old.class_names)
        ) == (
            *(passport.weights.identity, recipe, settings),
            *(passport.versions, passport.class_names),
        )
        if same:
            workspace.remember(card.name)
            return found
    samples = sample_images(passport.preprocess)
    artifact = export_graph(model.module, path, passport, samples, config, progress, release=True)
    workspace.remember(card.name)
    return artifact
