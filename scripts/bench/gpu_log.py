"""Runs checks as subprocesses with a time limit, and writes what came of them as tables.

A check that fails or hangs stops no other one.  A check ends as one of

    passed     it ran, and what it printed is as it should be
    failed     it ended with another exit code, hung, or printed what it should not
    not run    this machine lacks what it needs, which is named; that is no pass
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Result = Literal["passed", "failed", "not run"]
# What a check's reader makes of its standard output: the numbers for the table.
Reader = Callable[[str], str]
# Lines of a failed check's log in the Markdown.
TAIL = 12
# Bytes at the end of a log that are read.
TAIL_BYTES = 8192


class FailedError(Exception):
    """What a check printed is not as it should be."""


class NotRunError(Exception):
    """A check did not compute what it was for, because the machine lacks something."""


@dataclass(frozen=True)
class Row:
    """One check: its step, its result, its seconds, and its numbers or the reason."""

    step: str
    check: str
    result: Result
    seconds: float
    text: str
    log: str = ""


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code, None if it was killed at its limit; its output."""

    code: int | None
    output: str
    seconds: float


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a file that are not blank, without colours."""
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
    return [line.rstrip() for line in lines if line.strip()][-count:]


def run(
    words: Sequence[str], limit: float, output: Path, log: Path, environment: Mapping[str, str]
) -> Ended:
    """Run a program; kill it and all that it started when ``limit`` seconds are over."""
    started = time.monotonic()
    with output.open("wb") as out, log.open("wb") as err:
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=environment,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(limit)
        finally:
            # Also what it left behind, such as processes that decode images.
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    seconds = time.monotonic() - started
    return Ended(code, output.read_text(errors="replace"), seconds)


@dataclass
class Log:
    """The checks of one run, in the folder ``folder``.

    ``seconds`` is the time for all checks: one that would begin later is not run, and one that
    runs then is killed.  ``machine`` are the facts above the table.
    """

    folder: Path
    seconds: float
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def add(self, row: Row) -> None:
        """Show a row, and write the tables, which are then whole if the machine stops here."""
        self.rows.append(row)
        ended = f"{row.step}: {row.check}: {row.result} ({row.seconds:.1f} s)"
        print(f"[{self.spent:4.0f} s] {ended}{': ' if row.text else ''}{row.text}", flush=True)
        self.write()

    def skip(self, step: str, check: str, reason: str) -> None:
        """Add a check that is not run."""
        self.add(Row(step, check, "not run", 0.0, reason))

    def check(
        self,
        step: str,
        check: str,
        words: Sequence[str],
        limit: float,
        *,
        read: Reader = lambda output: "",
        codes: Collection[int] = (0,),
        lacks: str = "",
        more: Mapping[str, str] | None = None,
    ) -> bool:
        """Run a check and add its row; return whether it passed.

        ``read`` turns the output into the row's text, and raises :class:`FailedError` or
        :class:`NotRunError`; ``codes`` are the exit codes that it reads.  ``lacks`` is why the
        check cannot run here, and ``more`` are environment variables.
        """
        rest = self.seconds - self.spent
        if not lacks and rest <= 0:
            lacks = f"the {self.seconds:g} s are over (--seconds)"
        if lacks:
            self.skip(step, check, lacks)
            return False
        name = re.sub(r"\W+", "-", f"{len(self.rows):02} {step} {check}".lower())
        output, log = (self.folder / f"{name}.{kind}" for kind in ("out", "log"))
        limit = min(limit, rest)
        ended = run(words, limit, output, log, {**self.environment, **(more or {})})
        result, text = _judged(ended, limit, codes, read, log)
        self.add(Row(step, check, result, ended.seconds, text, log.name))
        return result == "passed"

    def count(self, result: Result) -> int:
        """The number of checks with a result."""
        return sum(row.result == result for row in self.rows)

    @property
    def summary(self) -> str:
        """One sentence of how many checks ended how."""
        return (
            f"{self.count('passed')} passed, {self.count('failed')} failed, "
            f"{self.count('not run')} not run (which is no pass), in {self.spent:.0f} s"
        )

    def markdown(self) -> str:
        """The tables, and the last lines of the logs of failed checks."""
        lines = ["| machine | |", "| --- | --- |"]
        lines += [f"| {_cell(name)} | {_cell(text)} |" for name, text in self.machine.items()]
        lines += ["", "| step | check | result | seconds | numbers, or why not |"]
        lines += ["| --- | --- | --- | ---: | --- |"]
        for row in self.rows:
            cells = (row.step, row.check, row.result, f"{row.seconds:.1f}", row.text)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines += ["", f"{self.summary}."]
        for row in self.rows:
            if row.result == "failed" and row.log:
                log = self.folder / row.log
                # pytest writes to standard output only.
                path = log if last_lines(log, 1) else log.with_suffix(".out")
                tail = (f"    {line}" for line in last_lines(path, TAIL))
                lines += ["", f"`{path.name}` ends with", "", *tail]
        return "\n".join(lines) + "\n"

    def write(self) -> None:
        """Write ``table.md`` and ``table.json``."""
        found: dict[str, Any] = {
            "machine": self.machine,
            "seconds": round(self.spent, 1),
            "passed": self.count("passed"),
            "failed": self.count("failed"),
            "not_run": self.count("not run"),
            "rows": [asdict(row) for row in self.rows],
        }
        (self.folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        text = json.dumps(found, indent=1, ensure_ascii=False)
        (self.folder / "table.json").write_text(text + "\n", encoding="utf-8")


def _judged(
    ended: Ended, limit: float, codes: Collection[int], read: Reader, log: Path
) -> tuple[Result, str]:
    said = "".join(f": {line}" for line in last_lines(log, 1))
    if ended.code is None:
        return "failed", f"killed after {limit:.3g} s{said}"
    if ended.code not in codes:
        return "failed", f"exit code {ended.code}{said}"
    try:
        return "passed", read(ended.output)
    except NotRunError as reason:
        return "not run", str(reason)
    except FailedError as problem:
        return "failed", str(problem)
    # Such as JSON that was cut off, or that has other fields: whatever it is, others still run.
    except Exception as error:
        if ended.code:
            return "failed", f"exit code {ended.code}{said}"
        return "failed", f"its output cannot be read: {type(error).__name__}: {error}"


def _cell(text: str) -> str:
    """A cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
