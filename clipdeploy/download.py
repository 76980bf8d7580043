"""Fetch a card's weights once, into a cache, and only believe them with the right hash."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from clipdeploy.zoo import ModelCard
from exporters.errors import CheckpointError
from exporters.files import file_errors

__all__ = ["cache_folder", "cached_file", "fetch", "is_at_hand"]

HOME_VARIABLE = "CLIPDEPLOY_HOME"
OFFLINE_VARIABLE = "CLIPDEPLOY_OFFLINE"
# Seconds without a byte after which a server counts as gone.
_STALL = 30.0


def cache_folder() -> Path:
    """Where downloads are kept: ``$CLIPDEPLOY_HOME``, else ``~/.cache/clipdeploy``."""
    chosen = os.environ.get(HOME_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".cache" / "clipdeploy"


def cached_file(card: ModelCard) -> Path:
    """Where a card's weights lie, or will lie, in the cache."""
    return cache_folder() / "checkpoints" / card.file


def is_at_hand(card: ModelCard) -> bool:
    """Whether the card's weights need no download: they ship with clipdeploy or are cached."""
    return not card.file or cached_file(card).is_file()


@contextlib.contextmanager
def _stall_timeout(seconds: float) -> Iterator[None]:
    # torch.hub passes no timeout to urlopen: without a default a silent server holds us for ever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def fetch(card: ModelCard, *, progress: bool = True) -> Path:
    """The path of the card's weights, downloaded if they are not in the cache yet.

    The file gets its name only after its SHA-256 began with the card's prefix; an interrupted or
    wrong download leaves nothing.

    Raises:
        CheckpointError: offline, no answer, a stalled or cut connection, or a wrong hash.
        FileError: the cache cannot be written.
    """
    path = cached_file(card)
    if path.is_file():
        return path
    mend = f"fetch it by hand and pass --checkpoint {card.file}"
    if os.environ.get(OFFLINE_VARIABLE):
        raise CheckpointError(f"{card.name} is not in the cache and downloads are off", hint=mend)
    from torch.hub import download_url_to_file

    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _stall_timeout(_STALL):
            download_url_to_file(
                card.url, str(path), hash_prefix=card.sha256_prefix, progress=progress
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{card.url} sent other bytes than published: {error}",
            hint=f"try again, or {mend}",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        raise CheckpointError(f"cannot download {card.url}: {reason}", hint=mend) from error
    return path
