"""Exports a checkpoint to an FP32 graph and checks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from clipdeploy.core.passport import Passport, Recipe, TensorSpec, settings_of
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.engines.passport import library_versions
from clipdeploy.models.load import LoadedModel, WeightsChoice
from clipdeploy.models.probe import prove, read_probe
from clipdeploy.stages.class_names import ClassNames, name_classes
from clipdeploy.stages.samples import sample_images
from clipdeploy.stages.weights import load_weights
from clipdeploy.stages.zero_shot import prepare_weights
from clipdeploy.workspace.folder import Workspace
from exporters.checks import PARITY_BATCHES
from exporters.headers import GraphArtifact, existing_graph
from exporters.onnx import ExportConfig, export_graph

__all__ = ["export_model"]


def _passport(model: LoadedModel, named: ClassNames) -> Passport:
    size = model.card.image_size
    classes = model.module.config.classes
    embeds = model.module.config.embedding is not None
    return Passport(
        kind="graph",
        model=model.card.name,
        precision="fp32",
        weights=model.weights,
        recipe=model.recipe,
        preprocess=model.card.preprocess(model.recipe),
        input=TensorSpec("image", "float32", ("batch", 3, size, size)),
        output=TensorSpec("embedding" if embeds else "logits", "float32", ("batch", classes)),
        classes=classes,
        class_names=named.names,
        class_names_from=named.source,
        versions=library_versions(),
        task="embedding" if embeds else "classification",
    )


def _probed(
    model: LoadedModel,
    weights: WeightsChoice,
    found: GraphArtifact | None,
    note: Callable[[str], object],
) -> LoadedModel:
    """The model, with the record of whether its logits are those of the user's framework."""
    if weights.probe is None:
        old = found.passport if found else None
        same = old is not None and (old.weights.identity, old.recipe) == (
            model.weights.identity,
            model.recipe,
        )
        probed = same and old is not None and old.weights.probed
    else:
        probe = read_probe(Path(weights.probe))
        difference = prove(model, probe)
        count = len(probe.logits)
        note(f"probe: {count} inputs agree, by {difference:.1e} of the largest logit")
        probed = True
    return replace(model, weights=replace(model.weights, probed=probed))


def export_model(
    workspace: Workspace,
    name: str | None,
    weights: WeightsChoice = WeightsChoice(),
    recipe: Recipe = Recipe(),
    config: ExportConfig = ExportConfig(),
    *,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> GraphArtifact:
    """Export the FP32 graph of a model into the workspace and check it.

    A workspace keeps the checkpoint or seed that it was exported with: if ``weights`` names none,
    that one is used, and others are refused unless ``weights.replace``.  If ``name`` is None, the
    model is inferred from the checkpoint.  With ``weights.zero_shot``, the checkpoint is a CLIP,
    and the graph is a classifier of these texts; with ``weights.embedding`` it is a CLIP too, and
    the graph gives embeddings of images.  ``note`` is called with remarks: the inferred
    model, the weights that were chosen, names of classes that may be wrong.

    Raises:
        UsageError: ``weights`` differ from the workspace's and do not replace them.
        ClipdeployError: see :mod:`clipdeploy.core.errors`; no file is left behind.
    """
    card, weights = prepare_weights(workspace, name, weights, note, progress)
    with progress.task(f"load {card.name}"):
        model = load_weights(workspace, card, weights, recipe)
    for remark in model.notes:
        note(remark)
    path = workspace.graph(card.name, "fp32")
    found = existing_graph(path)
    model = _probed(model, weights, found, note)
    named = name_classes(model, weights, found.passport if found else None)
    if named.doubt:
        note(named.doubt)
    passport = _passport(model, named)
    settings = settings_of(config)
    if found and not force:
        old = found.passport
        same = (
            *(old.weights.identity, old.weights.probed, old.recipe, old.settings),
            *(old.versions, old.class_names),
        ) == (
            *(passport.weights.identity, passport.weights.probed, model.recipe, settings),
            *(passport.versions, passport.class_names),
        )
        # The graph is not reused if its checkpoint, the reference of `verify`, has moved.
        if same and (old.weights.path == passport.weights.path or Path(old.weights.path).is_file()):
            workspace.remember(card.name)
            return found
    samples = sample_images(passport.preprocess, max(PARITY_BATCHES))
    artifact = export_graph(model.module, path, passport, samples, config, progress, release=True)
    workspace.remember(card.name)
    return artifact
