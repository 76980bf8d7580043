"""Which class a folder of images stands for.

names      the folder has a class's name (ImageNet's wnids)
numbers    ImageNet-V2: 0 to 999, perhaps with zeros in front, counted from 0 or from 1
sorted     the names of the classes are unknown, and there are as many folders: their order is
           that of their names, as torchvision's ImageFolder and mmpretrain's CustomDataset
           have it
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.classes import Classes

__all__ = ["ClassFolders", "class_folders", "first_of"]

_SHOWN = 5


@dataclass(frozen=True)
class ClassFolders:
    """The class of each folder that is one, the others, and the classes with their names."""

    index: dict[str, int]
    others: tuple[str, ...]
    classes: Classes
    how: str = ""


def class_folders(
    folders: Sequence[str], classes: Classes, first: int | None, where: str
) -> ClassFolders | None:
    """The classes that ``folders`` stand for; None if none of them is one.

    ``first`` is the number of the first class in folders that are numbers, None if it is to be
    found out; ``where`` names the folder around them.

    Raises:
        DatasetError: numbers that are no classes, that could be counted from 0 or from 1, or more
            or fewer folders than classes whose names are unknown.
    """
    named = {folder: classes.index[folder] for folder in folders if folder in classes.index}
    numbers = {folder: int(folder) for folder in folders if _is_number(folder)}
    if first is not None and not numbers:
        raise DatasetError(
            f"{where} has no folder that is a number", hint="leave out --first-class"
        )
    if named and first is None:
        others = tuple(sorted(set(folders) - set(named)))
        return ClassFolders(named, others, classes)
    if numbers and (classes.names or len(numbers) == len(folders)):
        return _numbered(numbers, folders, classes, first, where)
    return None if classes.names else _sorted(folders, classes, where)


def _is_number(folder: str) -> bool:
    return folder.isascii() and folder.isdecimal() and len(folder) <= 9


def first_of(numbers: set[int], count: int) -> int | None:
    """Whether classes are counted from 0 or from 1; None if the numbers do not show it."""
    if 0 in numbers:
        return 0
    return 1 if numbers == set(range(1, count + 1)) else None


def _numbered(
    numbers: dict[str, int],
    folders: Sequence[str],
    classes: Classes,
    first: int | None,
    where: str,
) -> ClassFolders:
    values = set(numbers.values())
    twice = [value for value, often in Counter(numbers.values()).items() if often > 1]
    if twice:
        raise DatasetError(
            f"{where} has two folders of the number {twice[0]}",
            hint="one folder for each class is needed",
        )
    chosen = first_of(values, classes.count) if first is None else first
    if chosen is None:
        raise DatasetError(
            f"the folders of {where} are numbers from {min(values)} to {max(values)}: the "
            f"{classes.count} classes could be counted from 0 or from 1",
            hint="say which: --first-class 0 or --first-class 1",
        )
    wrong = sorted(value for value in values if not 0 <= value - chosen < classes.count)
    if wrong:
        raise DatasetError(
            f"{where} has a folder {wrong[0]}, and the model's {classes.count} classes are "
            f"{chosen} to {chosen + classes.count - 1}",
            hint="other folder names, another model, or --first-class 0 or 1",
        )
    by_number = sorted(numbers, key=lambda folder: numbers[folder])
    if not classes.names and first is None and by_number != sorted(numbers):
        raise DatasetError(
            f"the folders of {where} are numbers, and the order of the model's classes is unknown: "
            "sorted as names, as torchvision's ImageFolder does, 10 comes before 2",
            hint="name the classes in the order of the logits: --class-names FILE; or say that "
            f"the numbers are the classes: --first-class {chosen}",
        )
    index = {folder: value - chosen for folder, value in numbers.items()}
    others = tuple(sorted(set(folders) - set(numbers)))
    names = classes.names or tuple(str(chosen + each) for each in range(classes.count))
    how = f"folder {chosen} is the first class"
    return ClassFolders(index, others, Classes(classes.count, names), how)


def _sorted(folders: Sequence[str], classes: Classes, where: str) -> ClassFolders:
    names = tuple(sorted(folders))
    if len(names) != classes.count:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise DatasetError(
            f"{where} has {len(names)} class folders ({', '.join(names[:_SHOWN])}{more}), the "
            f"model has {classes.count} classes without names",
            hint="name them in the order of the logits: --class-names FILE",
        )
    index = {name: position for position, name in enumerate(names)}
    how = "the classes in the order of the folders' names"
    return ClassFolders(index, (), Classes(classes.count, names), how)
