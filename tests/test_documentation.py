"""The documentation against the program: what it shows to type is understood, and runs."""

from __future__ import annotations

import configparser
import csv
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import pytest
from command_lines import find_command, parse
from command_server import CommandProgram
from doc_pages import Block, Page
from judging import each_once
from script_module import load_script

from calibration.scheme import SchemeConfig
from clipdeploy import pipeline
from clipdeploy.cli.main import main
from clipdeploy.core.data_rows import read_rows
from clipdeploy.core.display import Shown
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES = [*TOP, *sorted(DOCS.glob("*.md"))]
COMMANDS = "docs/commands.md: python scripts/command_reference.py writes it anew"


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("path", PAGES, ids=named)


# --- the commands that a page shows ---------------------------------------------------------------


def option_names(command: click.Command) -> set[str]:
    """Every spelling of every option."""
    options = [each for each in command.params if isinstance(each, click.Option)]
    names = (name for each in options for name in (*each.opts, *each.secondary_opts))
    return {*names, "--help", "--version"}


def leaves(command: click.Command = main) -> Iterator[click.Command]:
    yield command
    for child in command.commands.values() if isinstance(command, click.Group) else ():
        yield from leaves(child)


ANY_OPTION = {name for command in leaves() for name in option_names(command)}


def strangers(span: str) -> set[str]:
    """The options in a span that the command it names, or any command if it names none, lacks."""
    words = span.removeprefix("clipdeploy ").split()
    asked = set(re.findall(r"(?<!\S)--[a-z][\w-]*|(?<=/)--[a-z][\w-]*", span))
    if words[0] in main.commands:
        return asked - option_names(find_command(words)[0])
    return asked - ANY_OPTION if words[0].startswith("--") else set()


@every_page
def test_commands_of_a_page_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.name == "configuration.md":
        # It shows what a setting makes of the commands.
        monkeypatch.setenv("CLIPDEPLOY_VAL_DATA", "images")
    page = Page.read(path)
    for block in page.blocks():
        for words in block.commands():
            parse(words)
    wrong = {span: found for span in page.spans() if (found := strangers(span))}
    assert not wrong


def test_there_are_commands_to_check() -> None:
    shown = [
        words for path in PAGES for block in Page.read(path).blocks() for words in block.commands()
    ]
    assert len(shown) > 40


@pytest.mark.parametrize(
    "line",
    [
        "clipdeploy verfy --data X",
        "clipdeploy verify --daat X",
        "clipdeploy verify --data X --layout sideways",
        "clipdeploy verify --data",
        "clipdeploy bisect",
        "clipdeploy calibrate mrge",
        "clipdeploy zoo shwo",
        "clipdeploy demo X",
    ],
)
def test_a_wrong_line_is_caught(line: str) -> None:
    for text in (f"\n\n    {line}\n", f"```sh\n{line}\n```\n", f"```sh\n$ {line} | head\n```\n"):
        (words,) = [w for block in Page(Path("x.md"), text).blocks() for w in block.commands()]
        with pytest.raises(click.UsageError):
            parse(words)


@pytest.mark.parametrize(
    ("span", "wrong"),
    [
        ("clipdeploy verify --repot", {"--repot"}),
        ("quantize --max-drop", {"--max-drop"}),
        ("--max-drop", set()),
        ("--no-such-option", {"--no-such-option"}),
        ("export --offline/--no-ofline", {"--no-ofline"}),
        ("verify merge --output", set()),
        ("pip install --force-reinstall torch", set()),
    ],
)
def test_a_wrong_option_is_caught(span: str, wrong: set[str]) -> None:
    assert strangers(span) == wrong


# --- pages and links ------------------------------------------------------------------------------


def broken_links(page: Page) -> list[str]:
    """Links of a page that lead nowhere, with what is missing."""
    broken = []
    for file, anchor in page.links():
        target = page.path.parent / file
        if not target.exists():
            broken.append(file)
        elif anchor and anchor not in (Page.read(target) if file else page).anchors():
            broken.append(f"{file}#{anchor}")
    return broken


@every_page
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(Page.read(path)) == []


def test_a_broken_link_is_caught() -> None:
    text = "# One\n[a](commands.md#nowhere) [b](no.md) [c](#one) [d](#two) `[e](no.md)`\n"
    assert broken_links(Page(DOCS / "x.md", text)) == ["commands.md#nowhere", "no.md", "#two"]


def test_every_page_is_in_the_index() -> None:
    linked = {file for file, _ in Page.read(DOCS / "README.md").links()}
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= linked


@every_page
def test_scripts_of_a_page_exist(path: Path) -> None:
    for script in set(re.findall(r"scripts/[\w/]+\.(?:sh|py)", Page.read(path).text)):
        assert (ROOT / script).is_file(), script


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def tables(page: Page) -> list[str]:
    """Indented blocks with a number with a point in them."""
    texts = [block.text for block in page.blocks() if not block.language]
    return [
        text for text in texts if re.search(r"\d\.\d", text) and "clipdeploy export" not in text
    ]


def test_the_numbers_of_the_readme_are_those_of_their_page() -> None:
    numbers = tables(Page.read(DOCS / "numbers.md"))
    shown = tables(Page.read(ROOT / "README.md"))
    assert len(shown) >= 2
    assert [table for table in shown if table not in numbers] == []


# --- the command reference ------------------------------------------------------------------------


def test_every_command_and_option_has_a_help() -> None:
    for command in leaves():
        assert command.help, command.name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, (command.name, option.name)


def test_the_command_reference_is_that_of_the_program() -> None:
    written = (DOCS / "commands.md").read_text(encoding="utf-8")
    assert written == load_script("command_reference").text(), COMMANDS


def test_every_command_and_option_is_in_the_reference() -> None:
    page = Page.read(DOCS / "commands.md")
    shared, *sections = re.split(r"^## clipdeploy ", page.text, flags=re.MULTILINE)
    assert missing_options(shared, sections) == []


def missing_options(shared: str, sections: list[str]) -> list[str]:
    missing = []
    titled = {section.partition("\n")[0]: section for section in sections}
    for name, command in load_script("command_reference").leaves(main, ""):
        section = titled.get(name.strip())
        if section is None:
            missing.append(name.strip())
            continue
        names = set(re.findall(r"--?[a-z][\w-]*", shared + section))
        missing += sorted(option_names(command) - names - {"--version"})
    return missing


def test_what_the_reference_lacks_is_found() -> None:
    page = (
        Page.read(DOCS / "commands.md")
        .text.replace("--opset", "--")
        .replace("## clipdeploy demo", "")
    )
    shared, *sections = re.split(r"^## clipdeploy ", page, flags=re.MULTILINE)
    assert missing_options(shared, sections) == ["--opset", "demo"]


# --- what runs ------------------------------------------------------------------------------------


def shell(page: Page, folder: Path, program: CommandProgram) -> subprocess.CompletedProcess[str]:
    """Run the marked shell blocks of a page in ``folder``, in order, until one fails."""
    (folder / "bin").mkdir(parents=True)
    program.write(folder / "bin")
    # A clone's folder has the demo's images.
    (folder / "clipdeploy").symlink_to(ROOT / "clipdeploy")
    lines = [block.text for block in page.blocks() if block.runs and block.language == "sh"]
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def running(language: str) -> list[Path]:
    pages = ((path, Page.read(path).blocks()) for path in PAGES)
    return [p for p, blocks in pages if any(b.runs and b.language == language for b in blocks)]


@pytest.mark.slow
@pytest.mark.parametrize("path", running("sh"), ids=named)
def test_shell_blocks_run(
    path: Path, demo_workspace: Workspace, program: CommandProgram, tmp_path: Path
) -> None:
    folder = tmp_path / "clone"
    if path.name != "getting-started.md":
        # The others start where that one ends.
        shutil.copytree(demo_workspace.root, folder / "artifacts")
    done = shell(Page.read(path), folder, program)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", ["clipdeploy zoo show nosuchmodel", "false", "echo $unset"])
def test_a_shell_block_that_fails_is_caught(
    line: str, program: CommandProgram, tmp_path: Path
) -> None:
    text = f"<!-- runs -->\n```sh\n{line}\necho went on\n```\n"
    done = shell(Page(Path("x.md"), text), tmp_path, program)
    assert done.returncode != 0
    assert "went on" not in done.stdout


def test_only_marked_blocks_run(program: CommandProgram, tmp_path: Path) -> None:
    text = (
        "```sh\nfalse\n```\n<!-- runs -->\n\n```sh\necho ran\n```\n<!-- runs -->\n```\nfalse\n```\n"
    )
    done = shell(Page(Path("x.md"), text), tmp_path, program)
    assert (done.returncode, done.stdout) == (0, "ran\n")


def execute(blocks: Sequence[Block]) -> dict[str, object]:
    """Run Python blocks in one namespace, like the cells of a notebook."""
    names: dict[str, object] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block.text, f"<block {number}>", "exec"), names)
    return names


@pytest.mark.slow
def test_python_examples_run_and_show_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [b for b in Page.read(DOCS / "python.md").blocks() if b.language == "python"]
    # tests/clipdeploy/verification/test_faults.py makes the repeated calls.
    with each_once():
        names = execute(blocks)
    shown = [value for value in names.values() if isinstance(value, Shown)]
    assert len({type(value) for value in shown}) >= 10
    for value in shown:
        html = value._repr_html_()
        assert html.count("<tr") >= 2, type(value)
        assert html.count("<table") == html.count("</table>")


def test_a_python_example_that_fails_is_caught() -> None:
    with pytest.raises(NameError):
        execute([Block("python", "a = 1", False), Block("python", "a + nosuchname", False)])


def test_every_command_is_in_the_python_page() -> None:
    spans = {span.partition(" ")[0] for span in Page.read(DOCS / "python.md").spans()}
    assert set(main.commands) - spans == set()


def test_every_name_of_the_python_api_is_in_its_page() -> None:
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text))
    assert set(pipeline.__all__) - words == set()
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__


# --- facts that a page repeats --------------------------------------------------------------------


def zoo_rows() -> list[dict[str, str]]:
    with (ROOT / "clipdeploy" / "data" / "zoo.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_column_of_the_zoo_is_explained() -> None:
    text = (DOCS / "adding-a-checkpoint.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?(?:, `(\w+)`)?", text, flags=re.MULTILINE)
    assert {name for names in listed for name in names if name} == set(zoo_rows()[0])


def test_every_column_of_the_gpus_is_explained() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Add a GPU")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?", section, flags=re.MULTILINE)
    assert [n for names in listed for n in names if n] == list(read_rows("gpus.csv")[0].columns)


def test_the_row_of_the_page_becomes_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = [
        b for b in Page.read(DOCS / "adding-a-checkpoint.md").blocks() if b.language == "csv"
    ]
    (row,) = csv.DictReader(block.text.splitlines())
    assert set(row) == set(zoo_rows()[0])
    rows = read_rows("zoo.csv")
    added = [*rows, replace(rows[0], columns=dict(row))]
    monkeypatch.setattr(cards, "read_rows", lambda name, hint: added)
    cards.shipped_cards.cache_clear()
    try:
        card = cards.find(row["name"])
        assert (card.patch, card.image_size) == (int(row["patch"]), int(row["image_size"]))
        assert card.tokens == int(row["tokens"])
        assert card.url.endswith(row["file"])
        assert cards.find(row["timm_name"]) == card
    finally:
        monkeypatch.undo()
        cards.shipped_cards.cache_clear()


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / "setup.cfg", encoding="utf-8")
    layers = contracts["importlinter:contract:clipdeploy"]["layers"]
    wanted = [line for line in layers.split("\n") if line]
    indented = [b for b in Page.read(DOCS / "architecture.md").blocks() if not b.language]
    shown = [re.split(r"\s{2,}", line.strip())[0] for line in indented[0].text.splitlines()]
    assert [line for line in shown if line] == wanted


def test_the_figure_and_the_table_of_int8_agree() -> None:
    script = load_script("int8_figure")
    (table,) = (each for each in tables(Page.read(DOCS / "int8.md")) if each.split()[0] == "steps")
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.strip().splitlines()[1:]]
    assert [row[0] for row in rows] == [*script.STEPS, *script.BEST]
    picture = (DOCS / "images" / "int8.svg").read_text(encoding="utf-8")
    drawn = re.findall(r">(\d+\.\d)</text>", picture)
    for column in (1, 2):
        column_of_table = [row[column] for row in rows]
        assert "|".join(column_of_table) in "|".join(drawn)
    # What it ends with is what a user gets.
    assert list(script.STEPS.values())[-1] == SchemeConfig()


def test_pictures_are_small() -> None:
    pictures = list((DOCS / "images").iterdir())
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture.name
