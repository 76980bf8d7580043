"""Every error that clipdeploy raises on purpose.

    ClipdeployError             catch this one
    ├── UsageError              an option or a name that does not exist (exit code 2)
    ├── FileError               the disk said no: permission, space, a missing file
    ├── CheckpointError         weights that cannot be read or do not fit the model
    ├── GraphError              an ONNX graph that breaks a promise
    ├── ArtifactError           a passport that is missing, unreadable or of something else
    ├── CalibrationError        activation statistics that cannot be trusted
    ├── DatasetError            images or labels that cannot be used
    ├── BuildError              the TensorRT builder refused
    ├── EngineError             an engine that cannot be run here
    └── ClusterError            a Ray cluster that does not answer, or that lost its work

A message says what was found and where; ``hint`` says what to do about it.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "BuildError",
    "CalibrationError",
    "CheckpointError",
    "ClipdeployError",
    "ClusterError",
    "DatasetError",
    "EngineError",
    "FileError",
    "GraphError",
    "UsageError",
    "first_line",
]


class ClipdeployError(Exception):
    """An error told to the user in one line: the symptom, then the mend."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(ClipdeployError):
    """An option, a name or a combination that does not exist."""

    exit_code = 2


class FileError(ClipdeployError):
    """The file system refused."""


class CheckpointError(ClipdeployError):
    """Weights that cannot be read, or that do not fit the model."""


class GraphError(ClipdeployError):
    """An ONNX graph that breaks a promise of the stage that made or takes it."""


class ArtifactError(ClipdeployError):
    """A file whose passport is missing, unreadable, or speaks of something else."""


class CalibrationError(ClipdeployError):
    """Activation statistics that cannot be collected or trusted."""


class DatasetError(ClipdeployError):
    """Images or labels that cannot be used."""


class BuildError(ClipdeployError):
    """The TensorRT builder refused the graph or the settings."""


class EngineError(ClipdeployError):
    """An engine that cannot be loaded or executed on this machine."""


class ClusterError(ClipdeployError):
    """A Ray cluster that cannot be used, or that lost its work for good."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's message.

    Returns the name of the error's class if its message is empty, and ``no reason given`` for an
    empty string.
    """
    if lines := str(error).strip().splitlines():
        return lines[0].rstrip()
    return "no reason given" if isinstance(error, str) else type(error).__name__
