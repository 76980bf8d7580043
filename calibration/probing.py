"""Finds calibration images that the model does not recognise, and inputs that hardly vary.

A trained model is surer of images like those that it was trained on (Hendrycks and Gimpel, 2017).
How sure depends on the model, so each image x is compared with a changed copy x' of itself:

    p(x) = largest softmax of the logits
    share of the images with p(x') > p(x)

    x' = 255 - x                  a large share: the images are negatives
    x' = x in BGR                 a large share: red and blue are exchanged
    x' = x, its cells shuffled    not a small share: the model sees no order in the images

Noise has a share of one half whatever the change.  ``scripts/bench/calibration_images.py`` prints
the shares of the demo's digits, and of images with faults.

An input of a Linear hardly varies if its median channel does not:

    max_i x_tc - min_i x_tc  over the images i, the largest of the tokens t,  / max |x_c|

is less than four of the 127 steps.  Tokens differ by their position also in a network that does not
look at the image, so each token is compared with itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.collect import TappedGraph
from calibration.policy import is_output
from calibration.table import CalibrationTable, Finding
from clipdeploy.core.passport import Passport
from exporters.samples import Samples

__all__ = ["Recognition", "probe", "shuffled_cells"]

# Enough images to see that nothing is wrong.
_FIRST = 16
# With fewer images the shares say little; they are few, which is reported.
_FEWEST = 16
# Of 16 images, as many may be surer in a changed copy; else all stored images are compared.
_SOUND = {"shuffled": 2, "negative": 8, "swapped": 8}
# Shares of all: those of noise are 0.5 with a standard deviation of 0.08 (40 images).
_UNLIKE = 0.3
_LIKELY = 0.8
_STEPS = 4 / 127
_TOKENS = 33
_CELLS = 8
_SHOWN = 3

F32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Recognition:
    """How a model answers N images: its classes (N,), and which of them change for the better.

    ``surer`` has, for each change, whether the model is surer of the changed copy, bool (N,).
    """

    answers: NDArray[np.int64]
    surer: dict[str, NDArray[np.bool_]]

    @property
    def sound(self) -> bool:
        """Whether these images are clearly like those that the model was trained on."""
        return all(int(surer.sum()) <= _SOUND[name] for name, surer in self.surer.items())

    def share(self, change: str) -> float:
        """The share of images whose changed copy the model is surer of; 0 if not tried."""
        surer = self.surer.get(change)
        return 0.0 if surer is None else float(surer.mean())


def shuffled_cells(crops: Pixels) -> Pixels:
    """The crops (N, S, S, 3) with their 8 x 8 equal cells in a random order, the same for each."""
    edge = crops.shape[1] // _CELLS
    whole = edge * _CELLS
    cells = crops[:, :whole, :whole].reshape(-1, _CELLS, edge, _CELLS, edge, 3)
    cells = cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(crops), -1, edge, edge, 3)
    cells = cells[:, np.random.default_rng(0).permutation(_CELLS * _CELLS)]
    cells = cells.reshape(-1, _CELLS, _CELLS, edge, edge, 3).transpose(0, 1, 3, 2, 4, 5)
    changed = crops.copy()
    changed[:, :whole, :whole] = cells.reshape(len(crops), whole, whole, 3)
    return changed


def _changes(crops: Pixels) -> dict[str, Pixels]:
    changes = {"negative": 255 - crops}
    if crops.shape[1] >= 2 * _CELLS:
        changes["shuffled"] = shuffled_cells(crops)
    if not np.array_equal(crops, crops[..., ::-1]):
        changes["swapped"] = np.ascontiguousarray(crops[..., ::-1])
    return changes


class _Prober:
    """Runs crops one by one, as the rounding of a batch depends on its size."""

    def __init__(self, graph: Path, passport: Passport, threads: int) -> None:
        # Nodes and values refer to each other, so that the graph of the statistics is still there.
        gc.collect()
        self._graph = TappedGraph(graph, threads)
        self._tensor, self._spec = passport.input, passport.preprocess
        count = min(_TOKENS, self._graph.tokens)
        self._tokens = np.linspace(0, self._graph.tokens - 1, count).astype(np.int64)
        self._lowest: list[F32] = []
        self._highest: list[F32] = []

    def _run(self, crop: Pixels) -> tuple[F32, list[F32]]:
        image = Samples(crop[None], self._spec).as_input(self._tensor)
        return self._graph.run(image, self._tokens)

    def logits(self, crops: Pixels) -> NDArray[np.float64]:
        """The logits (N, classes) of crops (N, S, S, 3)."""
        return np.concatenate([self._run(crop)[0] for crop in crops]).astype(np.float64)

    def observe(self, crops: Pixels) -> NDArray[np.float64]:
        """As :meth:`logits`, and extend the extremes of each tensor by token and channel."""
        logits = []
        for crop in crops:
            found, tensors = self._run(crop)
            logits.append(found)
            self._lowest = _each(np.minimum, self._lowest, tensors)
            self._highest = _each(np.maximum, self._highest, tensors)
        return np.concatenate(logits).astype(np.float64)

    def variation(self) -> dict[str, F32]:
        """By Linear: how far each channel (C,) varies over the observed images, at any token."""
        names = (tap.names[0] for tap in self._graph.taps)
        spans = zip(names, self._highest, self._lowest, strict=True)
        return {n: (high - low).max(axis=0) for n, high, low in spans if not is_output(n)}


def _each(extreme: np.ufunc, known: list[F32], found: list[F32]) -> list[F32]:
    if not known:
        return found
    return [extreme(one, other) for one, other in zip(known, found, strict=True)]


def _confidence(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of the largest softmax of logits (N, K), (N,)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(-np.log(np.exp(shifted).sum(axis=1)))


def _recognise(prober: _Prober, crops: Pixels, logits: NDArray[np.float64]) -> Recognition:
    sure = _confidence(logits)
    surer = {
        name: _confidence(prober.logits(changed)) > sure
        for name, changed in _changes(crops).items()
    }
    return Recognition(logits.argmax(axis=1), surer)


def probe(
    graph: Path, passport: Passport, table: CalibrationTable, *, trained: bool, threads: int = 0
) -> tuple[Finding, ...]:
    """What the FP32 ``graph`` with this ``passport`` says against the stored images.

    ``trained`` is False for random weights, which recognise nothing; neither does an embedding
    model, which has no classes.  ``threads``: number of ONNX Runtime threads, 0 for its default.

    Raises:
        GraphError: the graph cannot be run.
    """
    stored = table.stored()
    if stored is None or len(stored.crops) < 2:
        return ()
    prober = _Prober(graph, passport, threads)
    first = stored.crops[:_FIRST]
    logits = prober.observe(first)
    found = [*_still_findings(prober.variation(), table, len(first))]
    if trained and not passport.embeds and len(first) >= _FEWEST:
        known = _recognise(prober, first, logits)
        if not known.sound:
            known = _recognise(prober, stored.crops, prober.logits(stored.crops))
        found += _recognition_findings(known, passport.classes)
    return tuple(found)


def _recognition_findings(known: Recognition, classes: int) -> Iterator[Finding]:
    count = len(known.answers)
    changed = False
    for change, kind, what in (
        ("negative", "negatives", "the images look like negatives"),
        ("swapped", "channels", "red and blue of the images look exchanged"),
    ):
        if known.share(change) >= _LIKELY:
            changed = True
            surer = int(known.surer[change].sum())
            yield Finding(kind, f"{what}: the model is surer of {surer} of {count} if changed back")
    if not changed and known.share("shuffled") >= _UNLIKE:
        surer = int(known.surer["shuffled"].sum())
        yield Finding(
            "unlike",
            "the images look unlike those that the model was trained on: it is surer of "
            f"{surer} of {count} if their parts are shuffled",
        )
    answers = len(set(known.answers.tolist()))
    if answers <= max(1, min(classes, _FIRST) // 4):
        only = "the same class" if answers == 1 else f"only {answers} of its {classes} classes"
        yield Finding(
            "classes",
            f"the model gives {count} of the images {only}: calibrate with images of all classes",
        )


def _still_findings(
    variation: dict[str, F32], table: CalibrationTable, images: int
) -> Iterator[Finding]:
    still = [name for name, span in variation.items() if _share(span, table, name) < _STEPS]
    if still:
        yield Finding(
            "still",
            f"the input of {_listed(still)} hardly varies over {images} images: 8 bits cannot "
            "tell these images apart, and the range fits no others",
        )


def _share(span: F32, table: CalibrationTable, name: str) -> float:
    """How far the median channel varies, relative to its largest value."""
    largest = table.of(name).amax
    return float(np.median(span / np.maximum(largest, np.finfo(np.float32).tiny)))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
