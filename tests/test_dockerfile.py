"""The Dockerfile as far as it can be checked without Docker."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

from packaging.version import Version

from clipdeploy.packaging.servers import servers

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def test_it_has_only_known_instructions_and_starts_from_tensorrt() -> None:
    known = ["ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"]
    assert {name for name, _ in instructions()} == set(known)
    assert instructions()[0][0] == "ARG"
    assert instructions()[1] == ("FROM", "nvcr.io/nvidia/tensorrt:${RELEASE}-py3")


def test_its_tensorrt_is_new_enough_and_that_of_a_server() -> None:
    ((_, argument), *_) = instructions()
    release = argument.removeprefix("RELEASE=")
    (server,) = [one for one in servers() if one.release == release]
    assert f"{release} has TensorRT {server.tensorrt}," in TEXT
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    oldest = config["options.extras_require"]["tensorrt"].strip().removeprefix("tensorrt>=")
    assert Version(server.tensorrt) >= Version(oldest)
    page = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
    assert f"nvcr.io/nvidia/tensorrt:{release}-py3" in page
    assert f"TensorRT {server.tensorrt}," in page


def copied() -> set[str]:
    paths = (text.split()[:-1] for name, text in instructions() if name == "COPY")
    return {path for found in paths for path in found}


def test_what_it_copies_exists_and_is_not_ignored() -> None:
    assert [path for path in copied() if not (ROOT / path).exists()] == []
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied()


def test_it_copies_every_file_that_the_installation_reads() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    packages = config["options.packages.find"]["include"].split()
    wanted = {package.removesuffix("*") for package in packages}
    wanted |= {"setup.cfg", "pyproject.toml", "constraints.txt"}
    wanted |= {config["metadata"]["license_files"]}
    wanted |= {config["metadata"]["long_description"].removeprefix("file: ")}
    assert wanted == copied()
