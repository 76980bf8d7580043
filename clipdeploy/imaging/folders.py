"""Map class folders to class indices.

names      the folder is named after a class (ImageNet's wnids)
spellings  as names, with other case, spaces or punctuation, or with ImageNet's words for its wnids
numbers    ImageNet-V2: 0 to 999, with or without leading zeros, counted from 0 or from 1
sorted     the class names are unknown and there are as many folders as classes: classes are in the
           order of the folder names, as in torchvision's ImageFolder and mmpretrain's
           CustomDataset
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipdeploy.core.errors import DatasetError
from clipdeploy.imaging.classes import Classes

__all__ = ["ClassFolders", "class_folders", "first_of", "spelled_folders"]

_SHOWN = 5


@dataclass(frozen=True)
class ClassFolders:
    """The class index of each class folder, the other folders, and the classes with names.

    ``how`` is a phrase on how folders were mapped to classes, for reports.
    """

    index: dict[str, int]
    others: tuple[str, ...]
    classes: Classes
    how: str = ""


def class_folders(
    folders: Sequence[str], classes: Classes, first: int | None, where: str
) -> ClassFolders | None:
    """Map ``folders`` to classes; None if none of them is a class.

    ``first`` is the number of the first class where folders are numbers; None detects it.
    ``where`` is the parent folder, for messages.

    Raises:
        DatasetError: a number is not a class, or it is unclear whether numbers start at 0 or 1; or
            the class names are unknown and there are more or fewer folders than classes.
    """
    named = {folder: classes.index[folder] for folder in folders if folder in classes.index}
    numbers = {folder: int(folder) for folder in folders if _is_number(folder)}
    if first is not None and not numbers:
        raise DatasetError(f"no folder in {where} is a number", hint="remove --first-class")
    if named and first is None:
        others = tuple(sorted(set(folders) - set(named)))
        return ClassFolders(named, others, classes)
    if numbers and (classes.names or len(numbers) == len(folders)):
        return _numbered(numbers, folders, classes, first, where)
    return None if classes.names else _sorted(folders, classes, where)


def spelled_folders(folders: Sequence[str], classes: Classes, where: str) -> ClassFolders | None:
    """Map ``folders`` to classes by other spellings of their names; None if none of them is one.

    Raises:
        DatasetError: two folders are the same class, or a folder's name fits several classes.
    """
    index: dict[str, int] = {}
    for folder in folders:
        exact = classes.index.get(folder)
        fitting = classes.spelled(folder) if exact is None else (exact,)
        if len(fitting) > 1:
            names = ", ".join(classes.names[each] for each in fitting[:_SHOWN])
            raise DatasetError(
                f"the folder {folder} in {where} fits several classes: {names}",
                hint="rename it to the name of its class",
            )
        if fitting:
            index[folder] = fitting[0]
    if not index:
        return None
    label, count = Counter(index.values()).most_common(1)[0]
    if count > 1:
        same = [folder for folder in index if index[folder] == label]
        raise DatasetError(
            f"the folders {' and '.join(same[:_SHOWN])} in {where} are the same class, "
            f"{classes.names[label]}",
            hint="keep one folder per class",
        )
    others = tuple(sorted(set(folders) - set(index)))
    return ClassFolders(index, others, classes, "other spellings of the classes' names")


def _is_number(folder: str) -> bool:
    return folder.isascii() and folder.isdecimal() and len(folder) <= 9


def first_of(numbers: set[int], count: int) -> int | None:
    """The number of the first class, 0 or 1; None if the numbers do not determine it."""
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
    twice = [value for value, count in Counter(numbers.values()).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{where} has two folders with the number {twice[0]}",
            hint="keep one folder per class",
        )
    chosen = first_of(values, classes.count) if first is None else first
    if chosen is None:
        raise DatasetError(
            f"the folders in {where} are numbers from {min(values)} to {max(values)}: the "
            f"{classes.count} classes could be counted from 0 or from 1",
            hint="pass --first-class 0 or --first-class 1",
        )
    wrong = sorted(value for value in values if not 0 <= value - chosen < classes.count)
    if wrong:
        raise DatasetError(
            f"{where} has a folder {wrong[0]}, but the model's {classes.count} classes are "
            f"{chosen} to {chosen + classes.count - 1}",
            hint="rename the folder, use another model, or pass --first-class 0 or 1",
        )
    by_number = sorted(numbers, key=lambda folder: numbers[folder])
    if not classes.names and first is None and by_number != sorted(numbers):
        raise DatasetError(
            f"the folders in {where} are numbers, but the model's class order is unknown: "
            "torchvision's ImageFolder sorts them as text, 10 before 2",
            hint="pass the class names in logit order with --class-names FILE; if the folder "
            f"numbers are the class numbers, use --first-class {chosen}",
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
            f"{where} has {len(names)} class folders ({', '.join(names[:_SHOWN])}{more}), but the "
            f"model has {classes.count} unnamed classes",
            hint="pass their names in logit order: --class-names FILE",
        )
    index = {name: position for position, name in enumerate(names)}
    how = "classes in the order of the folder names"
    return ClassFolders(index, (), Classes(classes.count, names), how)
