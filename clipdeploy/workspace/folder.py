"""Defines the paths of each model's artifacts, and remembers the last model.

artifacts/
  workspace.json                      the last model
  clip-vit-demo/
    zero-shot.safetensors             export --zero-shot: the classifier, as a checkpoint
    fp32.onnx                         export
    calibration.json                  calibrate
    calibration.1-of-4.json           calibrate --shard 1/4, until `calibrate merge`
    fp16.onnx                         build-engine --fp16
    int8.onnx                         quantize
    int8-cpu.onnx                     quantize --cpu
    fp8.onnx                          quantize --fp8
    text-fp32.onnx                    export --text-tower: CLIP's text tower, for embeddings
    text-fp16.onnx                    build-engine --text-tower --fp16
    text-fp16.engine                  the same; its passport is beside it
    reference.json                    verify: the accuracy that proves PyTorch, if it is confirmed
    recipe.json                       search: the recipe of its INT8 graph
    search/                           search: measurements, and the recipes of the Pareto front
    search/times.json                 search --cost gpu: the times of engines
    int8.engine                       build-engine
    int8.engine.json                  its passport
    verification.jsonl                verify: a record per image
    verification.1-of-4.jsonl         verify --shard 1/4, until `verify merge`
    text-verification.jsonl           verify texts: a record per text
    disagreements.csv                 verify: images with another top-1 answer than PyTorch's
    bisection.json                    bisect: the last result and its heat map, for reports
    verification.html                 deploy, demo: the report
    benchmark.json                    deploy: the benchmark, and the artifacts measured
    triton/                           deploy: a Triton model repository
    deployment.html                   deploy: artifacts, verdict, how to serve them
    deployment.json                   the same as data
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clipdeploy.core.errors import ArtifactError, UsageError
from clipdeploy.core.files import write_atomic
from clipdeploy.core.passport import Passport, Precision, Tower, read_json, to_json
from clipdeploy.core.paths import StrPath
from clipdeploy.core.values import Fault, is_name, unless
from clipdeploy.models import cards
from clipdeploy.workspace.names import artifact_path
from clipdeploy.workspace.passports import checked_passport

__all__ = ["PRECISIONS", "Workspace"]

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")


@dataclass(frozen=True)
class _State:
    last_model: str

    def faults(self) -> Iterator[Fault]:
        """Yield impossible values; see :mod:`clipdeploy.core.values`."""
        valid = is_name(self.last_model)
        yield from unless(valid, "last_model", self.last_model, "a model's name")


@dataclass(frozen=True, init=False)
class Workspace:
    """Paths of artifacts under one folder; folders are created when something is written.

    A model may be given by any of its names.
    """

    root: Path

    def __init__(self, root: StrPath) -> None:
        object.__setattr__(self, "root", Path(root))

    def folder(self, model: str) -> Path:
        """The folder of one model's artifacts."""
        return self.root / cards.full_name(model)

    def graph(self, model: str, precision: Precision, tower: Tower = "image") -> Path:
        """The ONNX graph of one precision."""
        name = cards.full_name(model)
        return artifact_path(self.folder(model), name, precision, "onnx", tower)

    def engine(self, model: str, precision: Precision, tower: Tower = "image") -> Path:
        """The TensorRT engine of one precision."""
        name = cards.full_name(model)
        return artifact_path(self.folder(model), name, precision, "engine", tower)

    def zero_shot(self, model: str) -> Path:
        """The checkpoint of a zero-shot classifier."""
        return self.folder(model) / "zero-shot.safetensors"

    def calibration(self, model: str, shard: tuple[int, int] | None = None) -> Path:
        """The calibration table, or one shard of it."""
        return self.folder(model) / f"calibration{_part(shard)}.json"

    def verification(self, model: str, shard: tuple[int, int] | None = None) -> Path:
        """The records of the last verification, or of one shard of it."""
        return self.folder(model) / f"verification{_part(shard)}.jsonl"

    def text_verification(self, model: str) -> Path:
        """The records of the last verification of the text tower."""
        return self.folder(model) / "text-verification.jsonl"

    def bisection(self, model: str) -> Path:
        """The last bisection's finding and heat map."""
        return self.folder(model) / "bisection.json"

    def disagreements(self, model: str) -> Path:
        """The images with another top-1 answer than PyTorch's."""
        return self.folder(model) / "disagreements.csv"

    def report(self, model: str) -> Path:
        """The report on the last verification, unless another path was given."""
        return self.folder(model) / "verification.html"

    def benchmark(self, model: str) -> Path:
        """The results of the last deployment's benchmark."""
        return self.folder(model) / "benchmark.json"

    def deployment(self, model: str) -> Path:
        """The page about the last deployment; the ``.json`` file next to it has the same data."""
        return self.folder(model) / "deployment.html"

    def triton(self, model: str) -> Path:
        """The Triton model repository of a deployment, unless another path was given."""
        return self.folder(model) / "triton"

    def recipe(self, model: str) -> Path:
        """The recipe file of a search."""
        return self.folder(model) / "recipe.json"

    def search(self, model: str) -> Path:
        """The folder of a search's measurements."""
        return self.folder(model) / "search"

    def source(self, model: str, tower: Tower = "image") -> tuple[Path, Passport]:
        """Return the FP32 graph, from which everything else is made, and its passport.

        Raises:
            UsageError: the model, or its text tower, has not been exported here, or it has none.
            ArtifactError, GraphError, FileError: the graph cannot be read, is of another model, or
                does not match its passport, see :mod:`clipdeploy.workspace.passports`.
        """
        model = cards.full_name(model)
        text = tower == "text"
        if text and (card := cards.full_card(model)) is not None and card.embedding is None:
            raise UsageError(
                f"{model} gives logits, and has no text tower",
                hint="export CLIP with --embeddings --text-tower",
            )
        path = self.graph(model, "fp32", tower)
        if not path.exists():
            raise UsageError(
                f"{'the text tower of ' * text}{model} has not been exported in {self.root}",
                hint=f"clipdeploy export --model {model}{' --text-tower' * text}",
            )
        passport = checked_passport(path, model=model, tower=tower).graph
        if passport.precision != "fp32":
            raise ArtifactError(
                f"the passport of {path} does not match its file name: precision is "
                f"{passport.precision}, not fp32",
                hint=f"export it again: clipdeploy export --model {model} --force",
            )
        return path, passport

    @property
    def _state(self) -> Path:
        return self.root / "workspace.json"

    def remember(self, model: str) -> None:
        """Make ``model`` the default of commands without ``--model``.

        Raises:
            FileError: the workspace cannot be written.
        """
        if not self._state.exists() or self.last_model() != model:
            write_atomic(self._state, to_json(_State(model)))

    def last_model(self) -> str:
        """Return the model of the last command that had one.

        Raises:
            UsageError: there is none yet.
            ArtifactError: ``workspace.json`` is damaged.
        """
        if not self._state.exists():
            raise UsageError(
                f"no model in the workspace {self.root} yet",
                hint="name one: clipdeploy export --model NAME",
            )
        return read_json(self._state, _State).last_model


def _part(shard: tuple[int, int] | None) -> str:
    return ".{}-of-{}".format(*shard) if shard else ""
