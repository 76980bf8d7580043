"""What is odd about a set of images: what can be told before the work, and what only after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Few", "Reading", "Survey"]

_SHOWN = 5
_UNREADABLE = "{} images cannot be read"
_DUPLICATES = "{} images have the bytes of another one"


@dataclass(frozen=True)
class Few:
    """How many things there are, and the first few of them."""

    count: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, things: Iterable[str]) -> Few:
        """Count ``things`` and keep the first five."""
        listed: Sequence[str] = list(things)
        return cls(len(listed), tuple(listed[:_SHOWN]))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(self.first) + more


@dataclass
class Reading:
    """What reading the images brought to light; pass it to ``iter_crops``.

    ``read``: images read, unreadable ones included; ``cached``: how many crops the cache had;
    ``cache_problem``: a sentence on why it keeps no more or none, empty if it does.
    """

    read: int = 0
    cached: int = 0
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    cache_problem: str = ""
    _first: dict[bytes, str] = field(default_factory=dict, repr=False)

    def add(self, name: str, sha256: str) -> None:
        """Note an image's content; a second one with the same bytes is a duplicate."""
        self.read += 1
        first = self._first.setdefault(bytes.fromhex(sha256), name)
        if first != name:
            self.duplicates.append(f"{name} is {first}")

    def add_unreadable(self, name: str) -> None:
        """Note an image that could not be read."""
        self.read += 1
        self.unreadable.append(name)

    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is odd."""
        return _sentences(
            (Few.of(self.unreadable), _UNREADABLE),
            (Few.of(self.duplicates), _DUPLICATES),
        )


@dataclass(frozen=True)
class Survey:
    """A set of images in figures; true if nothing is odd.

    ``classes`` are the classes with an image, ``absent_classes`` those without.  ``missing`` are
    listed in the labels but not there, ``unlabelled`` there but without a class, ``skipped`` left
    out for that reason, ``repeated`` names are listed twice with one class, ``ignored`` are links
    in archives, links to folders seen before, hidden images and what is no file, ``others`` files
    that are no images.
    """

    layout: str
    images: int
    classes: int
    absent_classes: Few
    missing: Few
    unlabelled: Few
    skipped: Few
    repeated: Few
    ignored: Few
    others: Few

    def __bool__(self) -> bool:
        return not self.problems()

    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is odd."""
        return _sentences(
            (self.missing, "{} listed images are not there"),
            (self.unlabelled, "{} images have no class"),
            (self.skipped, "{} images without a class were left out"),
            (self.absent_classes, "{} classes have no image"),
            (self.repeated, "{} images are listed twice"),
            (self.ignored, "{} entries were left out"),
            (self.others, "{} files are no images and were left out"),
        )


def _sentences(*told: tuple[Few, str]) -> tuple[str, ...]:
    return tuple(f"{text.format(few.count)}: {few}" for few, text in told if few)
