"""What a wheel holds, by setup.cfg: all files of the packages, and nothing else."""

from __future__ import annotations

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def setup() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def packages() -> list[Path]:
    """The top-level folders that are installed."""
    patterns = setup()["options.packages.find"]["include"].split()
    return [ROOT / pattern.removesuffix("*") for pattern in patterns]


def data_files(package: Path) -> set[Path]:
    """What lies in a package beside Python's sources."""
    found = (path for path in package.rglob("*") if path.is_file())
    return {path for path in found if path.suffix not in (".py", ".pyc")}


def declared(package: Path) -> set[Path]:
    patterns = setup()["options.package_data"][package.name].split()
    return {path for pattern in patterns for path in package.glob(pattern)}


def test_every_data_file_is_installed() -> None:
    for package in packages():
        assert data_files(package) == declared(package)


def test_every_pattern_finds_something() -> None:
    for package in packages():
        for pattern in setup()["options.package_data"][package.name].split():
            assert list(package.glob(pattern)), pattern


def test_every_package_is_typed() -> None:
    assert [package for package in packages() if not (package / "py.typed").is_file()] == []


def test_every_folder_with_sources_is_a_package() -> None:
    # find: leaves folders without __init__.py out, and all that is below them.
    folders = {path.parent for package in packages() for path in package.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_no_tests_are_installed() -> None:
    assert not [path for package in packages() for path in package.rglob("test_*.py")]
