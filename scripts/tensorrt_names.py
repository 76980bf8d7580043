"""Write down which names TensorRT's Python module has, from a wheel of its type stubs.

    pip download --no-deps tensorrt-stubs==10.13.0.35.1
    python scripts/tensorrt_names.py tensorrt_stubs-10.13.0.35.1-py3-none-any.whl

writes ``tests/support/tensorrt_names.json``: every class with its attributes, and the functions.
TensorRT itself cannot be installed without NVIDIA's libraries; the tests hold the names that the
code uses against this list, and against ``tensorrt_rtx``, which they import.
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
    """Class -> its public attributes and methods; a function has none.

    Line by line: the stubs are not everywhere valid Python.
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
    # The layers of a network are the parser's business.
    return {
        name: sorted(set(inside))
        for name, inside in found.items()
        if not re.fullmatch(r"I\w+Layer", name)
    }


def main() -> None:
    """Read the wheel that is named on the command line."""
    wheel = Path(sys.argv[1])
    names = {"source": [wheel.name]} | dict(sorted(names_of(wheel).items()))
    TARGET.write_text(json.dumps(names, indent=0) + "\n")
    print(f"{TARGET.name}: {len(names) - 1} names of {wheel.name}")


if __name__ == "__main__":
    main()
