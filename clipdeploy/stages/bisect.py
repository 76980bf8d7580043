"""A graph against its FP32 reference, part by part: which one costs the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipdeploy.core.errors import UsageError
from clipdeploy.core.files import sha256_file, write_atomic
from clipdeploy.core.passport import Passport, to_json
from clipdeploy.core.paths import StrPath, as_path
from clipdeploy.core.plots import inline_svg
from clipdeploy.core.progress import SILENT, Progress
from clipdeploy.core.spans import BATCH, IMAGES, SEED, THREADS, check_numbers
from clipdeploy.imaging import ImageFolder, Labelling, iter_crops, select, stack_batches
from clipdeploy.imaging.labelled import open_labelled
from clipdeploy.models.cards import takes_any_name
from clipdeploy.tuning.bisection import Batch, measure
from clipdeploy.tuning.chain import Chain
from clipdeploy.tuning.culprit import find_culprits, verdict
from clipdeploy.tuning.drawing import draw_bisection
from clipdeploy.tuning.linears import linear_facts
from clipdeploy.tuning.result import Bisection
from clipdeploy.tuning.taps import InputMeter, find_tap
from clipdeploy.verification.reports import HeatMap
from clipdeploy.workspace.folder import Workspace
from clipdeploy.workspace.passports import checked_passport, is_vouched
from exporters.samples import Samples

__all__ = ["BisectConfig", "bisect_model"]

_DEFAULT_IMAGES = 64


@dataclass(frozen=True)
class BisectConfig:
    """``images``: how many, None for up to 64; ``seed`` draws them; ``batch``: how many at once.

    ``threads``: ONNX Runtime's, 0 for its own choice; ``labelling``: the classes of the images.

    Raises:
        UsageError: a number that cannot be.
    """

    images: int | None = None
    seed: int = 0
    batch: int = 8
    threads: int = 0
    labelling: Labelling = field(default_factory=Labelling)

    def __post_init__(self) -> None:
        check_numbers(self, images=IMAGES.or_none, seed=SEED, batch=BATCH, threads=THREADS)


def _choose(
    data: Path, passport: Passport, config: BisectConfig, note: Callable[[str], object]
) -> ImageFolder:
    everything = open_labelled(data, passport, config.labelling, note, required=False)
    count = config.images or min(len(everything.entries), _DEFAULT_IMAGES)
    return select(everything, count, config.seed)


def _existing(candidate: Path) -> Path:
    if not candidate.exists():
        raise UsageError(f"{candidate} does not exist", hint="clipdeploy quantize, or name a graph")
    return candidate


def _candidate_passport(candidate: Path, reference: Passport) -> Passport | None:
    """The candidate's passport, None if it has lost it.

    Raises:
        ArtifactError, GraphError: it cannot be read, or says something else than the reference or
            the graph itself.
    """
    return checked_passport(candidate, reference).graph if is_vouched(candidate) else None


@takes_any_name
def bisect_model(
    workspace: Workspace,
    model: str,
    data: StrPath,
    candidate: StrPath | None = None,
    config: BisectConfig = BisectConfig(),
    *,
    note: Callable[[str], object] = lambda text: None,
    progress: Progress = SILENT,
) -> Bisection:
    """Find the part of ``candidate``, the INT8 graph if left out, that costs the accuracy.

    It may be any FP16 or INT8 graph with the node names of the FP32 graph, passport or not.
    ``note`` is told what is odd about the images.

    Raises:
        ClipdeployError: see :mod:`clipdeploy.core.errors`.
    """
    data = Path(data)
    candidate = as_path(candidate)
    source, passport = workspace.source(model)
    candidate = _existing(candidate or workspace.graph(model, "int8"))
    theirs = _candidate_passport(candidate, passport)
    random_weights = passport.weights.kind == "random"
    images = _choose(data, passport, config, note)
    labelled = images.labelled and not random_weights
    with progress.task(f"load {candidate.name}"):
        chain = Chain(source, candidate, threads=config.threads)
        names = chain.linears
        meter = InputMeter(
            chain.candidate, [find_tap(chain.candidate, name) for name in names], config.threads
        )
    size = config.batch

    def batches() -> Iterator[Batch]:
        spec = passport.preprocess
        crops = ((crop.entry.label or 0, crop.pixels) for crop in iter_crops(images, spec))
        for labels, pixels in stack_batches(crops, size):
            samples = Samples(pixels, spec)
            meter.add(samples.as_input((theirs or passport).input))
            yield Batch(samples.as_input(passport.input), np.asarray(labels) if labelled else None)

    count = -(-len(images.entries) // size)
    measured = measure(chain, batches(), count, progress)
    peaks = meter.result()
    facts = {name: linear_facts(chain, name, peaks[name]) for name in names}
    culprits = find_culprits(measured, facts)
    found = Bisection(
        model=model,
        reference=str(source),
        candidate=str(candidate),
        precision=theirs.precision if theirs else "unknown",
        data=str(data),
        labelled=labelled,
        random_weights=random_weights,
        measured=measured,
        linears=tuple(facts.values()),
        culprits=culprits,
        sentence=verdict(measured, culprits, labelled=labelled),
    )
    _keep_picture(found, candidate, workspace.bisection(model))
    return found


def _keep_picture(found: Bisection, candidate: Path, path: Path) -> None:
    """What the reports of ``verify`` show of it."""
    svg = inline_svg(draw_bisection(found, titled=False), "bisection")
    picture = HeatMap(candidate.name, sha256_file(candidate), found.sentence, svg)
    write_atomic(path, to_json(picture))
