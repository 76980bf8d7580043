"""Fetch a card's weights once, into a cache, and only believe them with the right hash."""

from __future__ import annotations

import contextlib
import glob
import http.client
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

from clipdeploy.core.addresses import masked, without_secrets
from clipdeploy.core.cache import cache_folder
from clipdeploy.core.errors import CheckpointError, UsageError, first_line
from clipdeploy.core.files import file_errors
from clipdeploy.models.cards import ModelCard

__all__ = ["HUB_PREFIX", "cached_file", "fetch", "fetch_hub", "is_at_hand"]

OFFLINE_VARIABLE = "CLIPDEPLOY_OFFLINE"
MIRROR_VARIABLE = "CLIPDEPLOY_MIRROR"
_OFF = ("", "0", "false", "no", "off")
HUB_PREFIX = "hf://"
# ValueError: an address that is none.
_NETWORK = (URLError, ConnectionError, TimeoutError, ValueError, http.client.HTTPException)
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Seconds without a byte after which a server counts as gone.
_STALL = 30.0
# torch.hub's unfinished downloads; one that has stood still for so many seconds is nobody's.
_UNFINISHED, _ABANDONED = ".????????????????????????????????.partial", 20 * _STALL


def cached_file(card: ModelCard) -> Path:
    """Where a card's weights lie, or will lie, in the cache."""
    return cache_folder() / "checkpoints" / card.file


def is_at_hand(card: ModelCard) -> bool:
    """Whether the card's weights need no download: they ship with clipdeploy or are cached."""
    return card.shipped or (bool(card.file) and cached_file(card).is_file())


@contextlib.contextmanager
def _stall_timeout(seconds: float) -> Iterator[None]:
    # torch.hub passes no timeout to urlopen: without a default a silent server holds us for ever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _is_offline(asked: bool) -> bool:
    # Whatever is not plainly a no forbids downloads.
    return asked or os.environ.get(OFFLINE_VARIABLE, "").lower() not in _OFF


def address(card: ModelCard) -> str:
    """Where a card's weights are fetched from: its own URL, or ``$CLIPDEPLOY_MIRROR``/file.

    A query such as ``?token=...`` stays at the end.  It may hold secrets, see
    :mod:`clipdeploy.core.addresses`.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return card.url
    folder, mark, query = mirror.partition("?")
    return f"{folder.rstrip('/')}/{card.file}{mark}{query}"


def fetch(card: ModelCard, *, offline: bool = False, progress: bool = True) -> Path:
    """The path of the card's weights, downloaded if they are not in the cache yet.

    The file gets its name only after its SHA-256 began with the card's prefix; an interrupted or
    wrong download leaves nothing, and the next one starts afresh.  What a killed one has left is
    removed by a later one.

    Raises:
        CheckpointError: offline, no answer, a stalled or cut connection, a wrong hash, or nothing
            is published.
        FileError: the cache cannot be written.
    """
    if not card.file or not card.sha256_prefix:
        missing = "address" if not card.file else "hash"
        raise CheckpointError(
            f"no {missing} of {card.name}'s weights is known", hint="pass --checkpoint FILE"
        )
    path = cached_file(card)
    if path.is_file():
        return path
    url = address(card)
    mend = f"fetch it elsewhere and pass --checkpoint {card.file}"
    if _is_offline(offline):
        raise CheckpointError(f"{card.name} is not in the cache and downloads are off", hint=mend)
    from torch.hub import download_url_to_file

    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
    try:
        with file_errors("write", path), _network_errors(url, mend), _stall_timeout(_STALL):
            download_url_to_file(
                url, str(path), hash_prefix=card.sha256_prefix, progress=_shows_bar(progress)
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{masked(url)} sent other bytes than published: {without_secrets(str(error), url)}",
            hint=f"try again, or {mend}",
        ) from _shown_cause(error, url)
    return path


def _shows_bar(wanted: bool) -> bool:
    """A bar is drawn with carriage returns, which have no place in a file."""
    return wanted and sys.stderr.isatty()


def _remove_abandoned(path: Path) -> None:
    """What killed downloads of ``path`` have left."""
    for unfinished in path.parent.glob(glob.escape(path.name) + _UNFINISHED):
        with contextlib.suppress(FileNotFoundError):  # that download was alive, and has ended
            if time.time() - unfinished.stat().st_mtime > _ABANDONED:
                unfinished.unlink()


def _shown_cause(error: Exception, url: str) -> Exception | None:
    """The first error, which --debug shows; None where it may hold a secret of the address."""
    return error if masked(url) == url else None


@contextlib.contextmanager
def _network_errors(url: str, mend: str) -> Iterator[None]:
    try:
        yield
    except _NETWORK as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise CheckpointError(
            f"cannot download {masked(url)}: {without_secrets(reason, url)}", hint=mend
        ) from _shown_cause(error, url)


def fetch_hub(reference: str, *, offline: bool = False, progress: bool = True) -> Path:
    """The weights of ``hf://OWNER/NAME`` from the Hugging Face hub, ``.safetensors`` if it has any.

    Raises:
        UsageError: the reference names no repository, or huggingface_hub is not installed.
        CheckpointError: no such repository or file, or no connection.
    """
    repository = reference.removeprefix(HUB_PREFIX)
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(f"{reference!r} names no repository", hint="such as hf://timm/NAME")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise UsageError(
            "hf:// needs huggingface_hub", hint='pip install "clipdeploy[hub]"'
        ) from error
    # It says every retry; the error at the end says it once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not _shows_bar(progress):
        disable_progress_bars()
    cache, local = cache_folder() / "hub", _is_offline(offline)
    for name in _HUB_FILES:
        try:
            return Path(hf_hub_download(repository, name, cache_dir=cache, local_files_only=local))
        except LocalEntryNotFoundError as error:
            if not local:
                raise _no_hub(reference, error) from error
        except EntryNotFoundError:
            continue
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _no_hub(reference, error) from error
    where = "in the cache, and downloads are off" if local else "there"
    raise CheckpointError(
        f"{reference}: neither {' nor '.join(_HUB_FILES)} is {where}",
        hint="check the name, or fetch a file and pass its path",
    )


def _no_hub(reference: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot fetch {reference}: {first_line(error)}",
        hint="check the name and the connection, or fetch a file and pass its path",
    )
