"""Write docs/commands.md: every command, its help, its options, its example.

    python scripts/command_reference.py [FILE]

It is made from the commands themselves: what is to be said about one is said in its help (the
docstring, the options' ``help``, the ``epilog``).  Run this after changing them.
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
from clipdeploy.cli.options import Option

DEFAULT = Path(__file__).parents[1] / "docs" / "commands.md"
_HEAD = """# The commands

<!-- Written by scripts/command_reference.py from the commands' own help: change it there. -->

{links}

## What they have in common

{but} these:

{table}

Exit codes: 0 success, 1 error, 2 usage error, 3 verification failed, 130 interrupted. An error is
one line with the cause and what to do. Results are printed on stdout, progress and notes on stderr.
A command without `--model` uses the last model of the workspace and prints its name. Options that
exclude each other, and options that would have no effect, are usage errors; values from
`clipdeploy.toml` and the environment never are.

Where a command takes only one kind of images, `--data` is short for `--calibration-data` or
`--val-data`, and `--images` for `--calibration-images` or `--val-images`.

"""
_FORMER = """

## Former names

These options still work under their former names and print a note.

{table}
"""


def leaves(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by what is typed; a group's default has the group's."""
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
    """Names and help as ``--help`` has them, in its order, ``--help`` itself left out."""
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
    r"""Help as Markdown: paragraphs; what follows a ``\b`` keeps its lines."""
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
    """The options that :func:`clipdeploy.cli.common.stage_command` adds."""
    command = click.command()(stage_command(lambda context: 0))
    return _options(command, click.Context(command))


def text() -> str:
    """The page as it stands in the file."""
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
    return head + "\n\n".join(sections) + _FORMER.format(table=_former_names(found))


def _former_names(commands: list[tuple[str, click.Command]]) -> str:
    """A table of the former names, the present ones, and the commands that have them."""
    names: dict[tuple[str, str], list[str]] = {}
    for name, command in commands:
        for param in command.params:
            for pair in param.formerly.items() if isinstance(param, Option) else ():
                names.setdefault(pair, []).append(name.partition(" ")[2])
    rows = [f"| `{old}` | `{new}` | {', '.join(each)} |" for (old, new), each in names.items()]
    return "\n".join(["| former | now | commands |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else DEFAULT).write_text(text(), encoding="utf-8")
