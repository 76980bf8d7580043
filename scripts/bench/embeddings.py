"""Measures what FP16 and 8 bits do to embeddings: to their search, and to cosines with texts.

    python scripts/bench/embeddings.py

The model is the demo CLIP on its 500 test digits, calibrated on its 200 calibration digits.  For
each graph: the SQNR of the embeddings and the smallest cosine of an image's embedding with
PyTorch's, the share of images whose nearest neighbour is found (R@k, see
:mod:`clipdeploy.verification.retrieval`), the mean and the largest change of a cosine between an
image and a digit's text, and the zero-shot top-1.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.config import QuantizeConfig
from calibration.policy import Scope
from clipdeploy.models import cards
from clipdeploy.models.clip.pair import read_pair
from clipdeploy.models.clip.prompts import read_prompts
from clipdeploy.models.clip.zero_shot import class_embeddings
from clipdeploy.models.load import WeightsChoice
from clipdeploy.pipeline import (
    VerifyScope,
    calibrate_model,
    convert_model,
    export_model,
    quantize_model,
    verify_model,
)
from clipdeploy.verification.result import Row
from clipdeploy.verification.results import read_results
from clipdeploy.workspace.folder import Workspace

CLIP = cards.demo_file("clip")
RECIPES = {
    "INT8": QuantizeConfig(),
    "INT8, --effort best": QuantizeConfig(effort="best"),
    "INT8 with attention": QuantizeConfig(scope=Scope(attention=True)),
    "FP8": QuantizeConfig(format="fp8"),
}
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """A row of the verification, and the embeddings (N, D) of PyTorch and of the graph."""

    row: Row
    names: tuple[str, ...]
    reference: Rows
    artifact: Rows


def measure(workspace: Workspace, model: str, graph: Path) -> Measured:
    """Verify one graph on all test digits."""
    scope = VerifyScope(artifacts=(graph,))
    judged = verify_model(workspace, model, cards.demo_file("test.zip"), scope=scope)
    assert judged.verification is not None
    assert judged.results is not None
    records = read_results(judged.results).records

    def rows(embeddings: list[bytes]) -> Rows:
        return np.frombuffer(b"".join(embeddings), "<f4").reshape(len(embeddings), -1)

    return Measured(
        judged.verification.rows[0],
        tuple(record.name for record in records),
        rows([record.embedding for record in records]),
        rows([record.outcomes[0].embedding for record in records]),
    )


def line(name: str, found: Measured, texts: Rows) -> str:
    """A row of the table."""
    row, fidelity = found.row, found.row.fidelity
    assert fidelity is not None
    assert fidelity.sqnr_db is not None
    assert row.retrieval is not None
    change = np.abs((found.artifact - found.reference) @ texts.T)
    labels = np.asarray([int(each.partition("/")[0]) for each in found.names])
    top1 = 100 * float(np.mean((found.artifact @ texts.T).argmax(axis=1) == labels))
    recalls = (row.retrieval.recall1, row.retrieval.recall5, row.retrieval.recall10)
    return (
        f"{name:20} {fidelity.sqnr_db:5.1f} {fidelity.cosine:7.4f} "
        + " ".join(f"{each:6.1f}" for each in recalls)
        + f" {change.mean():9.4f} {change.max():8.4f} {top1:6.1f}  {row.verdict}"
    )


def main() -> None:
    """Print the table."""
    prompts = read_prompts(CLIP / "digits.txt", CLIP / "templates.txt")
    texts = class_embeddings(read_pair(CLIP).text, prompts)[0].numpy()
    print(f"{'':20}    dB  cosine    R@1    R@5   R@10  text mean      max  top-1  verdict")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(folder)
        fp32 = export_model(workspace, None, WeightsChoice(CLIP, embedding="normalised"))
        model = fp32.passport.model
        calibrate_model(workspace, model, cards.demo_file("calibration.zip"))
        print(line("FP32", measure(workspace, model, fp32.path), texts))
        fp16 = convert_model(workspace, model)
        print(line("FP16", measure(workspace, model, fp16.path), texts))
        for name, config in RECIPES.items():
            made = quantize_model(workspace, model, config).artifact
            print(line(name, measure(workspace, model, made.path), texts), flush=True)


if __name__ == "__main__":
    main()
