"""Rich's console without control characters from file names, class names and messages.

Rich itself leaves ESC and other control characters in a text, and a terminal obeys them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from clipdeploy.core.printable import printable

__all__ = ["PlainConsole"]


class PlainConsole(Console):
    """A console on which only rich moves the cursor, sets colours and breaks lines."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """See :class:`rich.console.Console`."""
        return self._shown(super().render(renderable, options))

    @staticmethod
    def _shown(segments: Iterable[Segment]) -> Iterator[Segment]:
        for segment in segments:
            # Rich's own sequences are not text: they are segments with a control code.
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)
