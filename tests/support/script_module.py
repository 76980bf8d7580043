"""Loads scripts of ``scripts/`` as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_script(name: str) -> ModuleType:
    """Load ``scripts/NAME.py`` once; it can import other scripts in its folder."""
    known = f"scripts.{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, SCRIPTS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses with postponed annotations look up their module.
        folders = [str((SCRIPTS / name).parent), str(SCRIPTS)]
        with mock.patch.object(sys, "path", [*folders, *sys.path]):
            sys.modules[known] = module
            spec.loader.exec_module(module)
    return sys.modules[known]
