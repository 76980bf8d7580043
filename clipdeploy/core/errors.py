"""The exceptions of clipdeploy.

    ClipdeployError             base class: catch this one
    ├── UsageError              invalid option, name or combination (exit code 2)
    ├── FileError               file system error: permission, space, missing file
    ├── CheckpointError         weights that cannot be read or do not fit the model
    ├── GraphError              invalid or unsupported ONNX graph
    ├── ArtifactError           passport that is missing, invalid or of another file
    ├── CalibrationError        unusable activation statistics
    ├── DatasetError            unusable images or labels
    ├── BuildError              failed TensorRT build
    ├── EngineError             engine that cannot be loaded or run on this machine
    └── ClusterError            Ray cluster that is unreachable or lost a task

The message names the problem and the value; ``hint`` says what to do.
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
    """Base class of all errors; ``str`` gives one line: the message, then the hint."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(ClipdeployError):
    """An invalid option, name or combination of options."""

    exit_code = 2


class FileError(ClipdeployError):
    """A file cannot be read or written."""


class CheckpointError(ClipdeployError):
    """Weights cannot be read, or do not fit the model."""


class GraphError(ClipdeployError):
    """An ONNX graph is invalid or unsupported."""


class ArtifactError(ClipdeployError):
    """The passport of a file is missing, invalid, or does not match the file."""


class CalibrationError(ClipdeployError):
    """Activation statistics cannot be collected or are unusable."""


class DatasetError(ClipdeployError):
    """Images or labels are unusable."""


class BuildError(ClipdeployError):
    """TensorRT cannot build an engine from the graph with these settings."""


class EngineError(ClipdeployError):
    """An engine cannot be loaded or run on this machine."""


class ClusterError(ClipdeployError):
    """A Ray cluster is unreachable, or lost a task repeatedly."""


def first_line(error: BaseException | str) -> str:
    """Return the first line of an error's message.

    Returns the name of the error's class if its message is empty, and ``no reason given`` for an
    empty string.
    """
    if lines := str(error).strip().splitlines():
        return lines[0].rstrip()
    return "no reason given" if isinstance(error, str) else type(error).__name__
