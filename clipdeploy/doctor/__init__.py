"""What this machine has, what is wrong with it, and the command that mends each thing.

Facts (:func:`this_machine`) and judgement (:func:`diagnose`) are apart: a described
:class:`Machine` is judged like the real one.
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
