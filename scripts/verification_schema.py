"""Write docs/verification.schema.json, the JSON schema of ``clipdeploy verify --json``.

    python scripts/verification_schema.py [FILE]

The schema is generated from the types of clipdeploy/verification/result.py: run this after changing
them.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import msgspec

from clipdeploy.verification.result import Verification

DEFAULT = Path(__file__).parents[1] / "docs" / "verification.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Return the schema as JSON values; every field is required."""
    (top,), parts = msgspec.json.schema_components([Verification], ref_template="#/$defs/{name}")
    for part in parts.values():
        part["description"] = inspect.cleandoc(part["description"]).replace("``", "`")
        part["required"] = list(part["properties"])
    return {"$schema": DIALECT, "title": "clipdeploy verify --json", **top, "$defs": parts}


def text() -> str:
    """Return the content of the file."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT).write_text(text(), encoding="utf-8")
