"""Checks a machine for clipdeploy, and gives the command that fixes each problem.

:func:`this_machine` collects the facts and :func:`diagnose` judges them, so that a
:class:`Machine` made by hand is judged like the real one.
"""

from clipdeploy.doctor.findings import Diagnosis, Finding, Level, diagnose
from clipdeploy.doctor.machine import Folder, Library, Machine, this_machine

__all__ = [
    "Diagnosis",
    "Finding",
    "Folder",
    "Level",
    "Library",
    "Machine",
    "diagnose",
    "this_machine",
]
