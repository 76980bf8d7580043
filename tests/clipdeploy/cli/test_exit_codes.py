"""An exit code is the command's, whoever reads: gone readers, full disks, closed streams.

Every way to lose the output is tried by real shells on a program of one small command that gives
any exit code; the real commands are tried in a few of them each, started by ``program``.

Covers: clipdeploy/cli/main.py, clipdeploy/cli/streams.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

if sys.platform == "win32" or not os.path.exists("/dev/full"):
    pytest.skip("POSIX shells and /dev/full", allow_module_level=True)

from command_cases import SEARCH, prepare
from command_server import CommandProgram
from graph_faults import ruin, turn_answers
from interrupts import hear_interrupts

from clipdeploy.cli.main import Program
from clipdeploy.models import cards
from clipdeploy.workspace.folder import Workspace

# The real group, options and error handling around a command whose result is an argument.
SMALL = """
import sys
import click
from clipdeploy.cli.common import emit, stage_command
from clipdeploy.cli.main import main
from clipdeploy.core.errors import FileError

@main.command()
@click.argument("result", type=int)
@stage_command
def judge(context, result):
    with context.progress.task("judging", 2) as advance:
        advance(2)
    context.note("a note")
    if result == 1:
        raise FileError("there is no file", hint="make it")
    if result == 130:
        raise KeyboardInterrupt
    # More than a pipe or a buffer holds.
    rows = ["a row \\N{PLUS-MINUS SIGN}"] * 20_000
    emit(context, {"rows": rows}, lambda: "\\n".join(rows))
    return result

main()
"""
# {} is the command; what is given is its exit code, not that of the last one of a pipe.
LOST = {
    "gone": "{} | true",
    "one line read": "{} | head -1",
    "nothing read of both": "{} 2>&1 | true",
    "full": "{} >/dev/full",
    "messages full": "{} 2>/dev/full",
    "both full": "{} >/dev/full 2>&1",
    "closed": "{} >&-",
    "messages closed": "{} 2>&-",
    "input closed": "{} <&-",
    "all closed": "{} <&- >&- 2>&-",
    "no columns": "COLUMNS=0 LINES=0 {}",
    "one column": "COLUMNS=1 LINES=1 {}",
    "negative columns": "COLUMNS=-1 LINES=-1 {}",
    "no number of columns": "COLUMNS=² LINES=³ {}",
    "columns without end": "COLUMNS=" + "9" * 5000 + " {}",
    "ASCII": "PYTHONIOENCODING=ascii {}",
    "Cyrillic, unbuffered": "PYTHONIOENCODING=iso8859-5:strict PYTHONUNBUFFERED=1 {}",
}
# Where an error's own line is lost.
UNHEARD = ("gone", "nothing read of both", "messages full", "both full", "messages closed")
FULL = ("full", "both full")
COMPLAINT = "error: the output is incomplete: cannot write stdout: No space left on device\n"


@dataclass(frozen=True)
class Ended:
    """What is left of a run: its exit code, and what could be written."""

    code: int
    out: bytes
    err: str


def shell(line: str, words: list[str], folder: Path) -> Ended:
    """Run ``words`` as ``line`` says in bash."""
    script = f"{line.format(shlex.join(words))}\nexit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=False)
    err = done.stderr.decode()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return Ended(done.returncode, done.stdout, err)


def small(*words: str) -> list[str]:
    return [sys.executable, "-c", SMALL, *words]


@pytest.mark.parametrize(
    ("code", "lost"),
    [
        *((code, lost) for code in (0, 3) for lost in LOST),
        *((code, lost) for code in (1, 2, 130) for lost in (*UNHEARD, "all closed")),
    ],
)
def test_the_code_is_the_commands(code: int, lost: str, tmp_path: Path) -> None:
    # click refuses what is no number.
    words = ["three" if code == 2 else str(code), *(["--json"] if code == 3 else [])]
    ended = shell(LOST[lost], small("judge", *words), tmp_path)
    assert ended.code == code
    if lost == "full":
        assert ended.err.endswith(COMPLAINT)
        assert ended.err.count("error: ") == 1
    else:
        assert "incomplete" not in ended.err
    # No file that was opened later got the number of a closed stream.
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        *(("zoo", lost) for lost in (*FULL, *UNHEARD[:2], "closed", "all closed")),
        *((words, lost) for words in ("zoo --json", "verify --help") for lost in ("full", "gone")),
    ],
)
def test_lost_output_is_an_error_where_it_is_the_only_product(
    words: str, lost: str, program: CommandProgram, tmp_path: Path
) -> None:
    ended = shell(LOST[lost], [*program.words, *words.split()], tmp_path)
    assert ended.code == (1 if lost in FULL else 0)
    assert ended.err.endswith(COMPLAINT) == (lost == "full")


def test_impossible_columns_change_nothing(program: CommandProgram, tmp_path: Path) -> None:
    usual = shell("env -u COLUMNS -u LINES {}", [*program.words, "zoo"], tmp_path)
    for lost in (name for name in LOST if "column" in name):
        assert shell(LOST[lost], [*program.words, "zoo"], tmp_path).out == usual.out, lost
    # A possible number still limits them.
    narrow = shell("COLUMNS=40 {}", [*program.words, "zoo"], tmp_path)
    assert max(map(len, narrow.out.decode().splitlines())) <= 40


def test_what_the_encoding_lacks_is_escaped_and_json_is_utf8(tmp_path: Path) -> None:
    lost = LOST["Cyrillic, unbuffered"]
    ended = shell(lost, small("judge", "0"), tmp_path)
    assert ended.out.count(b"a row \\xb1\n") == 20_000
    ended = shell(lost, small("judge", "0", "--json"), tmp_path)
    assert json.loads(ended.out.decode())["rows"] == ["a row ±"] * 20_000


def test_a_slow_reader_of_a_nonblocking_pipe_gets_everything(tmp_path: Path) -> None:
    # As a program leaves the pipe that it shares with us; a pipe holds less than the output.
    script = f"import os; os.set_blocking(1, False)\n{SMALL}"
    line = "{} | (sleep 0.5; cat)"
    ended = shell(line, [sys.executable, "-c", script, "judge", "3"], tmp_path)
    assert ended.code == 3
    assert ended.out.count(b"a row") == 20_000


def test_a_file_gets_no_number_of_a_closed_stream(tmp_path: Path) -> None:
    script = (
        "from clipdeploy.cli.streams import guard_streams\n"
        "import os, subprocess, sys\n"
        "guard_streams()\n"
        "with open('data', 'w') as data:\n"
        # What native libraries and programs that we start do.
        "    os.write(2, b'native'); subprocess.run(['sh', '-c', 'echo out; echo err >&2'])\n"
        "    print('lost'); print('lost', file=sys.stderr); sys.stdin.read()\n"
        "    data.write(str(data.fileno() > 2))\n"
    )
    assert shell(LOST["all closed"], [sys.executable, "-c", script], tmp_path).code == 0
    assert (tmp_path / "data").read_text() == "True"


def test_messages_are_tried_again_once_there_is_room(tmp_path: Path) -> None:
    script = (
        "from clipdeploy.cli.streams import guard_streams\n"
        "import os, sys\n"
        "guard_streams()\n"
        "for path in ('/dev/full', 'messages'):\n"
        "    opened = os.open(path, os.O_WRONLY | os.O_CREAT)\n"
        "    os.dup2(opened, 1); os.dup2(opened, 2)\n"
        "    print('a line', flush=True); print('a message', file=sys.stderr)\n"
    )
    assert shell("{}", [sys.executable, "-c", script], tmp_path).code == 0
    # A gap in the output would look like a whole one, so that nothing follows what was lost.
    assert (tmp_path / "messages").read_text() == "a message\n"


def test_ctrl_c_between_commands_is_130() -> None:
    @click.group(cls=Program)
    def program() -> None:
        raise KeyboardInterrupt

    @program.command()
    def command() -> None:
        """Never reached."""

    assert CliRunner().invoke(program, ["command"]).exit_code == 130


def test_streams_that_were_replaced_are_left_alone() -> None:
    @click.group(cls=Program)
    def program() -> None:
        click.echo("seen")

    program.add_command(click.Command("nothing", callback=lambda: None))
    before = sys.stdout, sys.stderr
    assert CliRunner().invoke(program, ["nothing"]).stdout == "seen\n"
    assert (sys.stdout, sys.stderr) == before


@pytest.fixture(scope="module")
def folder(demo_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of the demo, ``artifacts``, and one whose INT8 graph mistakes every image."""
    made = tmp_path_factory.mktemp("exit-codes")
    prepare(demo_workspace, made)
    shutil.copytree(made / "artifacts", made / "regressed")
    ruin(Workspace(made / "regressed").graph(cards.DEMO, "int8"), turn_answers)
    return made


GRAPH = f"artifacts/{cards.DEMO}/int8.onnx"
BAD = "--workspace regressed"
VERIFY = (
    "verify --data few.zip --images 12 --max-drop 45 --workers 0 --graphs-only --no-cache-crops"
)
# So few images prove no such drop.
DEPLOY = (
    "deploy --fp16 --val-data few.zip --val-images 12 --max-drop 0.01 --graphs-only --no-benchmark"
)
NEEDS_TENSORRT = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX")
REAL = [
    (f"{VERIFY} --json", "all closed", 0),
    (f"{VERIFY} {BAD}", "gone", 3),
    (f"{VERIFY} {BAD} --json", "one line read", 3),
    (f"{VERIFY} {BAD} --quiet", "all closed", 3),
    (f"{VERIFY} {BAD} --quiet", "no columns", 3),
    pytest.param(DEPLOY, "gone", 3, marks=NEEDS_TENSORRT),
    pytest.param(f"{DEPLOY} --json", "both full", 3, marks=NEEDS_TENSORRT),
    (SEARCH, "both full", 0),
    ("bisect --data test.zip --images 1", "both full", 0),
    (f"inspect {GRAPH}", "one column", 0),
    (f"inspect {GRAPH}", "gone", 0),
    (f"inspect {GRAPH} --json", "both full", 1),
    ("inspect nowhere.onnx", "messages closed", 1),
]


@pytest.mark.parametrize(("words", "lost", "code"), REAL)
def test_real_commands_keep_their_code(
    words: str, lost: str, code: int, program: CommandProgram, folder: Path
) -> None:
    assert shell(LOST[lost], [*program.words, *words.split()], folder).code == code


def test_full_disk_beside_a_verdict_is_reported_in_a_line(
    program: CommandProgram, folder: Path
) -> None:
    words = [*program.words, *f"{VERIFY} {BAD} --quiet".split()]
    ended = shell(LOST["full"], words, folder)
    assert (ended.code, ended.err) == (3, COMPLAINT)


def test_ctrl_c_is_130_without_a_reader(program: CommandProgram, folder: Path) -> None:
    words = "benchmark --batch 1 --seconds 600 --warmup 0"
    with subprocess.Popen(
        [*program.words, *words.split()],
        cwd=folder,
        preexec_fn=hear_interrupts,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert any(re.match(r"measuring \d+ artifacts", line) for line in process.stderr)
        process.stderr.close()
        # The line is printed just before the first round.
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
