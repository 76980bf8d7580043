"""Writes the part of Protobuf's text format that Triton's ``config.pbtxt`` needs.

    {"max_batch_size": 32, "input": [{"name": "image", "data_type": Enum("TYPE_FP32")}]}

    max_batch_size: 32
    input {
      name: "image"
      data_type: TYPE_FP32
    }

Source: protobuf.dev, "Text Format Language Specification".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

__all__ = ["Enum", "Field", "text_format"]


class Enum(str):
    """A value that is written without quotes."""

    __slots__ = ()


Field = str | int | Mapping[str, "Field"] | Sequence["Field"]


def text_format(message: Mapping[str, Field]) -> str:
    """Format a message as text; a sequence is a repeated field."""
    return "\n".join(_lines(message)) + "\n"


def _lines(message: Mapping[str, Field]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, Mapping):
            yield f"{name} {{"
            yield from (f"  {line}" for line in _lines(value))
            yield "}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for item in value:
                yield from _lines({name: item})
        else:
            yield f"{name}: {_scalar(value)}"


def _scalar(value: str | int) -> str:
    if isinstance(value, (int, Enum)):
        return str(value)
    # A JSON string in ASCII is also valid in text format.
    return json.dumps(value)
