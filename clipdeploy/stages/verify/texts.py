"""Verifies the text tower of an embedding model against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from clipdeploy.core.errors import UsageError
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.models import cards
from clipdeploy.models.cards import takes_any_name
from clipdeploy.models.clip.prompts import read_texts
from clipdeploy.models.load import reload_text
from clipdeploy.stages.texts import check_tokenizer
from clipdeploy.stages.verify.setup import Judgement, VerifyScope
from clipdeploy.verification.reports import Evidence
from clipdeploy.verification.retrieval import with_retrieval
from clipdeploy.verification.targets import named_targets, workspace_targets
from clipdeploy.verification.texts import TextSource
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_text_verification
from clipdeploy.workspace.folder import Workspace

__all__ = ["verify_texts"]


@takes_any_name
def verify_texts(
    workspace: Workspace,
    model: str,
    texts: StrPath,
    config: VerifyConfig = VerifyConfig(),
    scope: VerifyScope = VerifyScope(),
    *,
    keep: StrPath | None = None,
    force: bool = False,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Judgement:
    """Verify the text tower of an embedding model on the ``texts`` of a file, one a line.

    The texts take the place of images: the verdict is that of an embedding model, by the recall of
    PyTorch's nearest neighbours among the texts.  Of ``config``, the drop, the batch, ``trust`` and
    ``threads`` apply, of ``scope`` the artifacts.  The records are saved in ``keep``, by default in
    the workspace.

    Raises:
        UsageError: an option that is for images, or the text tower has not been exported.
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    _refuse_images_only(config, scope)
    path, passport = workspace.source(model, "text")
    check_tokenizer(path, passport)
    source = TextSource(Path(texts), read_texts(texts))
    if scope.artifacts:
        targets = named_targets(scope.artifacts, passport, trust=config.trust)
    else:
        targets = workspace_targets(workspace, model, graphs_only=scope.graphs_only, tower="text")
    with progress.task(f"load the text tower of {model} in PyTorch"):
        embedding = cards.find(passport.model).embedding or "raw"
        reference = reload_text(passport.weights, embedding)
    saved = as_path(keep) or workspace.text_verification(model)
    found = run_text_verification(
        reference, passport, targets, source, config, keep=saved, force=force, progress=progress
    )
    results = with_retrieval(found)
    for problem in results.run_key.problems:
        note(problem)
    verification = judge_results(results, config.limits, scope.expected)
    return Judgement(verification, saved, evidence=Evidence(results, why="texts have no pixels"))


def _refuse_images_only(config: VerifyConfig, scope: VerifyScope) -> None:
    known = VerifyConfig(
        config.max_drop, batch=config.batch, trust=config.trust, threads=config.threads
    )
    ours = VerifyScope(scope.artifacts, scope.graphs_only)
    if config != known or scope != ours:
        raise UsageError(
            "texts have no labels, pixels, shards or accuracy to expect",
            hint="leave out the options that are for images",
        )
