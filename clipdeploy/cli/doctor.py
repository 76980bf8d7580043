"""``clipdeploy doctor``: check this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdeploy.cli.common import Context, emit, stage_command
from clipdeploy.cli.usage import command
from clipdeploy.core.errors import FileError

if TYPE_CHECKING:
    from clipdeploy.doctor import Diagnosis

_MARKS = {"good": "ok", "note": "note", "warning": "warning", "error": "ERROR"}


@command(epilog="\b\nclipdeploy doctor --json")
@stage_command
def doctor(context: Context) -> int:
    """Check the libraries, GPU, driver and disk of this machine.

    Prints how to fix problems. The exit code is 1 if export, build-engine or verify cannot run.
    """
    try:
        from clipdeploy.doctor import diagnose, this_machine
    except ModuleNotFoundError as error:
        # A package that the checks need is missing, which is a finding too.
        raise FileError(
            f"the package {error.name} is not installed", hint="pip install ."
        ) from error

    with context.progress.task("check this machine"):
        diagnosis = diagnose(this_machine(context.workspace.root))
    emit(context, diagnosis, lambda: _render(diagnosis))
    return 0 if diagnosis else 1


def _render(diagnosis: Diagnosis) -> str:
    # Not a table: a command that a table wraps cannot be copied.
    lines = []
    for finding in diagnosis.findings:
        lines.append(f"{_MARKS[finding.level]:9}{finding.subject:14}{finding.text}")
        if finding.mend:
            lines.append(f"{'':9}{'':14}-> {finding.mend}")
    return "\n".join([*lines, "", _verdict(diagnosis)])


def _verdict(diagnosis: Diagnosis) -> str:
    errors, warnings = len(diagnosis.of("error")), len(diagnosis.of("warning"))
    if errors:
        return f"{errors} to fix before export, build-engine and verify can run here."
    beside = f"; {warnings} could be better" if warnings else ""
    return f"export, build-engine and verify can run here{beside}."
