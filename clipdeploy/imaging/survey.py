"""Report problems of a set of images: found by listing them, or by reading them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Few", "Reading", "Survey"]

_SHOWN = 5
_UNREADABLE = "{} images cannot be read"
_DUPLICATES = "{} images have the same bytes as another one"


@dataclass(frozen=True)
class Few:
    """The number of items, and the first five of them."""

    count: int = 0
    first: tuple[str, ...] = ()

    @classmethod
    def of(cls, items: Iterable[str]) -> Few:
        """Count ``items`` and keep the first five."""
        listed: Sequence[str] = list(items)
        return cls(len(listed), tuple(listed[:_SHOWN]))

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f" and {self.count - len(self.first)} more" if self.count > len(self.first) else ""
        return ", ".join(self.first) + more


@dataclass
class Reading:
    """Counts and problems of images that were read; ``iter_crops`` fills it.

    ``read``: images read, including unreadable ones.  ``cached``: crops found in the cache.
    ``cache_problem``: a sentence on why the cache stores no (more) crops, empty if it does.
    """

    read: int = 0
    cached: int = 0
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    cache_problem: str = ""
    _first: dict[bytes, str] = field(default_factory=dict, repr=False)

    def add(self, name: str, sha256: str) -> None:
        """Count an image; it is a duplicate if an earlier one has the same SHA-256."""
        self.read += 1
        first = self._first.setdefault(bytes.fromhex(sha256), name)
        if first != name:
            self.duplicates.append(f"{name} is {first}")

    def add_unreadable(self, name: str) -> None:
        """Count an image that could not be read."""
        self.read += 1
        self.unreadable.append(name)

    def problems(self) -> tuple[str, ...]:
        """One sentence per kind of problem."""
        return _sentences(
            (Few.of(self.unreadable), _UNREADABLE),
            (Few.of(self.duplicates), _DUPLICATES),
        )


@dataclass(frozen=True)
class Survey:
    """Counts and problems of a set of images, from its listing; true if there are no problems.

    Attributes:
        layout: where the classes come from, as a phrase.
        images: number of images.
        classes: number of classes with an image.
        absent_classes: classes without an image.
        missing: images in the label file that do not exist.
        unlabelled: images without a class.
        skipped: images left out because they have no class.
        repeated: images that the label file lists twice with the same class.
        ignored: links in archives, links to folders listed already, hidden images, devices.
        others: files that are not images.
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
        """One sentence per kind of problem."""
        return _sentences(
            (self.missing, "{} listed images do not exist"),
            (self.unlabelled, "{} images have no class"),
            (self.skipped, "{} images without a class were left out"),
            (self.absent_classes, "{} classes have no image"),
            (self.repeated, "{} images are listed twice"),
            (self.ignored, "{} entries were left out"),
            (self.others, "{} files are not images and were left out"),
        )


def _sentences(*findings: tuple[Few, str]) -> tuple[str, ...]:
    return tuple(f"{text.format(few.count)}: {few}" for few, text in findings if few)
