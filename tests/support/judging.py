"""Verifies many runners in one run, and measures their true drop.

The true drop is measured without the verifier: a runner answers all images in batches in which its
fault has an effect, and its answers are compared with PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cut_graphs import Remembered
from numpy.typing import NDArray

from clipdeploy.imaging import ImageFolder, iter_crops
from clipdeploy.models.load import LoadedModel
from clipdeploy.runners import Runner
from clipdeploy.runners.base import Closing, Images, Logits
from clipdeploy.verification import verifier
from clipdeploy.verification.result import Row, Verification
from clipdeploy.verification.results import ArtifactEntry
from clipdeploy.verification.targets import Target
from clipdeploy.verification.verdicts import judge_results
from clipdeploy.verification.verifier import VerifyConfig, run_verification
from exporters.samples import normalise

__all__ = [
    "ALLOWED",
    "CONFIG",
    "Digits",
    "EachOnce",
    "decibels",
    "each_once",
    "in_batches",
    "judge_runners",
    "largest_difference",
    "never_silent",
    "verification_of",
]

ALLOWED = 3.0
CONFIG = VerifyConfig(max_drop=ALLOWED, batch=16, workers=0, threads=1)


class EachOnce(Closing):
    """A graph's answers to each single image, computed once: repeated calls cost most of a run."""

    def __init__(self, runner: Runner) -> None:
        self._answers = Remembered(runner)
        self.name, self.input, self.batches = runner.name, runner.input, runner.batches

    def __call__(self, images: Images) -> Logits:
        """See :class:`clipdeploy.runners.Runner`; any number of images at once."""
        return self._answers(images)


@contextmanager
def each_once() -> Iterator[None]:
    """Answer repeated calls of a verification from memory: for faults outside of the graph."""
    real = verifier.open_target

    def opened(each: Target, **options: Any) -> tuple[Runner | None, ArtifactEntry]:
        runner, entry = real(each, **options)
        return EachOnce(runner) if runner else None, entry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "open_target", opened)
        yield


class Digits:
    """Preprocessed images, (N, 3, 32, 32) float32, with the reference's answers."""

    def __init__(self, folder: ImageFolder, model: LoadedModel) -> None:
        spec = model.card.preprocess(model.recipe)
        crops = list(iter_crops(folder, spec, workers=0))
        order = np.random.default_rng(7).permutation(len(crops))
        self.folder = folder
        self.images: Images = normalise(np.stack([crops[i].pixels for i in order]), spec)
        self.labels = np.asarray([crops[i].entry.label for i in order])
        with torch.inference_mode():
            self.reference: Logits = model.module(torch.from_numpy(self.images)).numpy()

    def drop(self, logits: Logits) -> float:
        """Return the points of top-1 that these answers lose against PyTorch's."""
        right = [(each.argmax(axis=1) == self.labels).mean() for each in (self.reference, logits)]
        return 100.0 * float(right[0] - right[1])


def in_batches(run: Callable[[Images], Logits], images: Images, size: int) -> Logits:
    """Answer all images in batches of ``size``; the last batch is filled with the first images."""
    filled = np.concatenate([images, images[: -len(images) % size]])
    parts = [run(filled[at : at + size]) for at in range(0, len(filled), size)]
    return np.concatenate(parts)[: len(images)]


def judge_runners(
    model: LoadedModel,
    template: Mapping[str, Target],
    runners: Mapping[str, tuple[str, Callable[[], Runner]]],
    images: ImageFolder,
    config: VerifyConfig = CONFIG,
) -> dict[str, Row]:
    """Return the row of every runner; each name maps to a precision and a factory.

    ``template`` has a correct graph of each precision, whose passport the runners share.
    """
    found = verification_of(model, template, runners, images, config)
    return dict(zip(runners, found.rows, strict=True))


def verification_of(
    model: LoadedModel,
    template: Mapping[str, Target],
    runners: Mapping[str, tuple[str, Callable[[], Runner]]],
    images: ImageFolder,
    config: VerifyConfig = CONFIG,
) -> Verification:
    """Return the rows and the complete verification."""
    made = {Path(f"{number}.engine"): each for number, each in enumerate(runners.values())}

    def opened(each: Target, **options: Any) -> tuple[Runner | None, ArtifactEntry]:
        runner = made[each.path][1]()
        kind = "engine" if runner.profiles else "graph"
        entry = ArtifactEntry(str(each.path), kind, each.precision, f"{each.path}", runner.name)
        return runner, entry

    targets = [replace(template[precision], path=path) for path, (precision, _) in made.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifier, "open_target", opened)
        results = run_verification(model, template["fp32"].passport, targets, images, config)
    result = judge_results(results, config.max_drop)
    assert result.baseline.status == "confirmed", result.baseline.sentence
    return result


def decibels(row: Row) -> float:
    """Return the SQNR of a row's first answers, infinite if equal to the reference's."""
    assert row.fidelity is not None
    return np.inf if row.fidelity.sqnr_db is None else row.fidelity.sqnr_db


def never_silent(row: Row, sound: Row, drop: float) -> None:
    """Assert that a true drop (in points) above the limit is never "equivalent".

    Below the limit the fault must at least be visible: another verdict, or twice the noise of the
    correct graph.
    """
    assert row.verdict != "equivalent" or drop <= ALLOWED, f"silent: {drop:.1f} points, {row}"
    assert row.verdict != "equivalent" or decibels(row) < decibels(sound) - 3, f"undetected: {row}"


def largest_difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest difference of two logits, infinite if one is NaN."""
    difference = np.abs(one.astype(np.float64) - other.astype(np.float64))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))
