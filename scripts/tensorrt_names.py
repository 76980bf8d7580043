"""Extract the names in TensorRT's Python module from a wheel of its type stubs.

    pip download --no-deps tensorrt-stubs==10.13.0.35.1
    python scripts/tensorrt_names.py tensorrt_stubs-10.13.0.35.1-py3-none-any.whl

writes ``tests/support/tensorrt_names.json``: every class with its attributes, and the functions.
TensorRT itself cannot be installed without NVIDIA's libraries.  The tests compare the names in
the code with this list, and with ``tensorrt_rtx``, which they import.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

STUBS = ("tensorrt_bindings/tensorrt.pyi", "tensorrt_bindings/__init__.pyi")
TARGET = Path(__file__).resolve().parent.parent / "tests" / "support" / "tensorrt_names.json"


def names_of(wheel: Path) -> dict[str, list[str]]:
    """Map each class to its public attributes and methods, each function to an empty list.

    Parsed line by line, because parts of the stubs are not valid Python.
    """
    found: dict[str, list[str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for stub in STUBS:
            inside: list[str] = []
            for line in archive.read(stub).decode().splitlines():
                if match := re.match(r"(?:class|def) (\w+)", line):
                    inside = found.setdefault(match[1], [])
                elif match := re.match(r"    (?:def )?([a-zA-Z]\w*|__members__)\b[(:]", line):
                    inside.append(match[1])
    # Layers of a network are created by the parser only.
    return {
        name: sorted(set(inside))
        for name, inside in found.items()
        if not re.fullmatch(r"I\w+Layer", name)
    }


def main() -> None:
    """Read the wheel given on the command line."""
    wheel = Path(sys.argv[1])
    names = {"source": [wheel.name]} | dict(sorted(names_of(wheel).items()))
    TARGET.write_text(json.dumps(names, indent=0) + "\n")
    print(f"{TARGET.name}: {len(names) - 1} names of {wheel.name}")


if __name__ == "__main__":
    main()
