from __future__ import annotations

import json
from dataclasses import replace

import pytest

from clipdeploy.core.errors import ArtifactError
from clipdeploy.core.passport import (
    FINDINGS_KEY,
    PASSPORT_SCHEMA,
    Passport,
    Preprocess,
    Recipe,
    TensorSpec,
    WeightsOrigin,
    from_json,
    to_json,
)

PASSPORT = Passport(
    kind="graph",
    model="clip-vit-demo",
    precision="int8",
    weights=WeightsOrigin("file", "/données/w.safetensors", "ab" * 32, layout="timm"),
    recipe=Recipe(numerics="as-shipped", resize="timm"),
    # Thirds have no short decimal: the round trip must keep every bit.
    preprocess=Preprocess(224, (1 / 3, 2 / 3, 0.1), (0.2, 0.3, 1 / 7), 0.95, "squash", False),
    input=TensorSpec("image", "float32", ("batch", 3, 224, 224)),
    output=TensorSpec("logits", "float32", ("batch", 1000)),
    classes=1000,
    class_names=("n01440764", "été", "犬"),
    parents={"source_graph": "cd" * 32},
    settings={"exclude": ["blocks.0.*"], "opset": 20, "nested": {"flag": True, "none": None}},
    versions={"torch": "2.0"},
)


def test_passport_survives_json() -> None:
    assert from_json(to_json(PASSPORT), Passport, "here") == PASSPORT


def test_passport_of_random_weights_survives_json() -> None:
    passport = replace(PASSPORT, weights=WeightsOrigin("random", seed=0), class_names=())
    assert from_json(to_json(passport).decode(), Passport, "here") == passport


def test_json_is_readable_and_in_declared_order() -> None:
    text = to_json(PASSPORT).decode()
    assert list(json.loads(text))[:3] == ["kind", "model", "precision"]
    assert text.count("\n") > 20


@pytest.mark.parametrize("schema", [PASSPORT_SCHEMA + 1, 999])
def test_newer_schema_is_refused_before_its_fields_are_read(schema: int) -> None:
    newer = json.dumps({"schema": schema, "unheard": "of"})
    with pytest.raises(ArtifactError, match=rf"here .*newer clipdeploy \(schema {schema}") as found:
        from_json(newer, Passport, "here")
    assert "upgrade" in found.value.hint


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_json_is_refused(fraction: float) -> None:
    data = to_json(PASSPORT)
    with pytest.raises(ArtifactError, match=r"^here cannot be read"):
        from_json(data[: int(len(data) * fraction)], Passport, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("kind", "poem"),
        ("precision", "int4"),
        ("classes", "1000"),
        ("classes", 10.5),
        ("weights", {"kind": "guess"}),
        ("input", {"name": "image", "dtype": "float32", "shape": [None]}),
        ("preprocess", {"size": 224, "mean": [0.5, 0.5], "std": [1, 1, 1]}),
        ("schema", "1"),
        ("schema", None),
    ],
)
def test_field_of_the_wrong_type_is_refused(key: str, value: object) -> None:
    raw = json.loads(to_json(PASSPORT))
    raw[key] = value
    with pytest.raises(ArtifactError, match=rf"\$\.{key}"):
        from_json(json.dumps(raw), Passport, "here")


@pytest.mark.parametrize("key", ["kind", "model", "weights", "preprocess", "output", "classes"])
def test_missing_field_is_refused(key: str) -> None:
    raw = json.loads(to_json(PASSPORT))
    del raw[key]
    with pytest.raises(ArtifactError, match=key):
        from_json(json.dumps(raw), Passport, "here")


@pytest.mark.parametrize("data", [b"null", b"[]", b"3", b'"text"', b"\xff\xfe\x00"])
def test_other_json_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        from_json(data, Passport, "here")


def test_damaged_byte_inside_a_string_is_refused() -> None:
    data = to_json(PASSPORT).replace(b"clip-vit-demo", b"clip\xffvit-demo")
    with pytest.raises(ArtifactError):
        from_json(data, Passport, "here")


@pytest.mark.parametrize(
    ("stored", "found"),
    [(["only 3 images"], ("only 3 images",)), ("only", ()), (None, ()), ([], ())],
)
def test_findings_of_the_calibration(stored: object, found: tuple[str, ...]) -> None:
    settings = {**PASSPORT.settings, FINDINGS_KEY: stored}
    assert replace(PASSPORT, settings=settings).calibration_findings == found
    assert PASSPORT.calibration_findings == ()


def test_identity_of_weights_ignores_where_the_file_lies() -> None:
    here = WeightsOrigin("file", "/a/w.pth", "ab" * 32)
    assert here.identity == replace(here, path="/b/w.pth").identity
    assert here.identity != replace(here, sha256="cd" * 32).identity
    assert WeightsOrigin("random", seed=1).identity != WeightsOrigin("random", seed=2).identity
