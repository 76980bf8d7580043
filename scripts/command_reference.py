"""Write docs/commands.md: help, options and examples of every command.

    python scripts/command_reference.py [FILE]

The page is generated from the commands: docstrings, ``help`` of options and ``epilog``.  Run this
after changing them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from clipdeploy.cli.common import DefaultGroup, stage_command
from clipdeploy.cli.main import main

DEFAULT = Path(__file__).parents[1] / "docs" / "commands.md"
_HEAD = """# The commands

<!-- Written by scripts/command_reference.py from the commands' own help: change it there. -->

{links}

## What they have in common

{but} these:

{table}

Exit codes: 0 good, 1 an error told in one line with what to do, 2 usage, 3 verification failed,
130 interrupted. The result is on stdout, progress and notes are on stderr. A command without
`--model` takes the last one of the workspace, and says which. Options that contradict each other,
and an option that would have no effect, are usage errors; what `clipdeploy.toml` or the environment
sets is not.

"""


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command that can be run, by name; a group's default has the group's name."""
    default = command.default if isinstance(command, DefaultGroup) else None
    if default is not None:
        assert isinstance(command, click.Group)
        yield name, command.commands[default]
    elif not isinstance(command, click.Group) or command.invoke_without_command:
        yield name, command
    if isinstance(command, click.Group):
        for child, below in command.commands.items():
            if child != default:
                yield from leaves(below, f"{name} {child}")


def _options(command: click.Command, context: click.Context) -> list[tuple[str, str]]:
    """Yield names and help of the options in the order of ``--help``, without ``--help``."""
    records = (
        option.get_help_record(context)
        for option in command.params
        if isinstance(option, click.Option)
    )
    return [record for record in records if record is not None]


def _table(options: list[tuple[str, str]]) -> str:
    rows = [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in options]
    return "\n".join(["| option | does |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


def _prose(text: str) -> str:
    r"""Convert help to Markdown: paragraphs; text after ``\b`` keeps its line breaks."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(text.partition("\f")[0]))
    return "\n\n".join(map(_block, blocks))


def _block(text: str) -> str:
    if not text.startswith("\b"):
        return re.sub(r"(?<![\w`-])(--[a-z][a-z0-9-]*)", r"`\1`", text)
    lines = text.removeprefix("\b").strip("\n")
    return f"```{'sh' if lines.startswith('clipdeploy ') else ''}\n{lines}\n```"


def _section(name: str, command: click.Command, common: set[tuple[str, str]]) -> str:
    context = click.Context(command, info_name=name)
    own = [each for each in _options(command, context) if each not in common]
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"## {name}", _prose(command.help or ""), f"```\n{name} {usage}\n```"]
    parts += [_table(own)] if own else []
    parts += [_prose(command.epilog)] if command.epilog else []
    return "\n\n".join(parts)


def _shared() -> list[tuple[str, str]]:
    """Return the options that :func:`clipdeploy.cli.common.stage_command` adds."""
    command = click.command()(stage_command(lambda context: 0))
    return _options(command, click.Context(command))


def text() -> str:
    """Return the content of the page."""
    found = list(leaves(main, "clipdeploy"))
    shared = _shared()
    without = [
        f"`{name}`"
        for name, command in found
        if not set(shared) <= set(_options(command, click.Context(command)))
    ]
    but = f"All but {', '.join(without)} take" if without else "All take"
    links = [f"[{name.partition(' ')[2]}](#{name.replace(' ', '-')})" for name, _ in found]
    table = _table([*shared, ("-h, --help", "Show the help and exit.")])
    sections = [_section(name, command, set(shared)) for name, command in found]
    head = _HEAD.format(links=" ·\n".join(links), but=but, table=table)
    return head + "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT).write_text(text(), encoding="utf-8")
