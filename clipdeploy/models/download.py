"""Download a card's weights into a cache and verify their hash."""

from __future__ import annotations

import contextlib
import glob
import http.client
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.error import URLError

from clipdeploy.core.addresses import masked, without_secrets
from clipdeploy.core.cache import cache_folder
from clipdeploy.core.errors import CheckpointError, FileError, UsageError, first_line
from clipdeploy.core.files import file_errors, sha256_file
from clipdeploy.core.values import is_hash
from clipdeploy.models.cards import ModelCard
from clipdeploy.models.hub import (
    INDEX,
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_NAMES,
    hub_folder,
    hub_parts,
)
from clipdeploy.models.shards import shard_names

__all__ = ["cached_file", "fetch", "fetch_hub", "is_cached", "is_hub_cached"]

OFFLINE_VARIABLE = "CLIPDEPLOY_OFFLINE"
MIRROR_VARIABLE = "CLIPDEPLOY_MIRROR"
_OFF = ("", "0", "false", "no", "off")
# ValueError: an invalid URL.
_NETWORK = (URLError, ConnectionError, TimeoutError, ValueError, http.client.HTTPException)
# Files of weights, in the order of preference, and those beside them that tell what they do not.
_TRANSFORMERS_CONFIGS = ("config.json", "preprocessor_config.json")
_HUB_FILES = {
    "model.safetensors": _TRANSFORMERS_CONFIGS,
    f"model.safetensors{INDEX}": _TRANSFORMERS_CONFIGS,
    "pytorch_model.bin": _TRANSFORMERS_CONFIGS,
    f"pytorch_model.bin{INDEX}": _TRANSFORMERS_CONFIGS,
} | dict.fromkeys(OPEN_CLIP_NAMES, (OPEN_CLIP_CONFIG,))
# Seconds without data after which a download fails.
_STALL = 30.0
# torch.hub's unfinished downloads.
_UNFINISHED = ".????????????????????????????????.partial"
# Seconds without a write after which an unfinished download counts as abandoned.
_ABANDONED = 20 * _STALL


def cached_file(card: ModelCard) -> Path:
    """The path of a card's weights in the cache, downloaded or not."""
    return cache_folder() / "checkpoints" / card.file


def is_cached(card: ModelCard) -> bool:
    """Whether the card's weights need no download: clipdeploy includes them or they are cached."""
    if card.on_hub:
        return is_hub_cached(card.hub_folder)
    return card.shipped or (bool(card.file) and cached_file(card).is_file())


def is_hub_cached(folder: str) -> bool:
    """Whether weights are in this folder of clipdeploy's cache of the hub."""
    found = (_hub_cache() / folder / "snapshots").glob("*/*")
    return any(path.name in _HUB_FILES and _has_shards(path) for path in found)


def _has_shards(path: Path) -> bool:
    """Whether all shards are beside an index; True for a file that is no index."""
    if not path.name.endswith(INDEX):
        return True
    try:
        return all(path.with_name(name).is_file() for name in shard_names(path))
    except (CheckpointError, FileError):
        return False


def _hub_cache() -> Path:
    return cache_folder() / "hub"


@contextlib.contextmanager
def _stall_timeout(seconds: float) -> Iterator[None]:
    # torch.hub passes no timeout to urlopen, so without a default a silent server blocks forever.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _is_offline(asked: bool) -> bool:
    # Any value of the variable that does not clearly mean "no" forbids downloads.
    return asked or os.environ.get(OFFLINE_VARIABLE, "").lower() not in _OFF


def address(card: ModelCard) -> str:
    """The URL to download a card's weights from: its own, or ``$CLIPDEPLOY_MIRROR``/file.

    The mirror's query, such as ``?token=...``, stays at the end.  It may contain secrets, see
    :mod:`clipdeploy.core.addresses`.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return card.url
    folder, mark, query = mirror.partition("?")
    return f"{folder.rstrip('/')}/{card.file}{mark}{query}"


def fetch(card: ModelCard, *, offline: bool = False, progress: bool = True) -> Path:
    """Return the path of the card's weights; download them if they are not cached.

    The file appears under its name only if its SHA-256 starts with the card's prefix.  An
    interrupted or wrong download leaves no file; a later download removes the files of a killed
    one.  Weights on the Hugging Face hub: see :func:`fetch_hub`.

    Raises:
        CheckpointError: downloads are off, the download fails or stalls, the hash is wrong, or the
            weights are not published.
        UsageError: huggingface_hub is needed and not installed.
        FileError: the cache cannot be written.
    """
    if card.on_hub:
        return fetch_hub(card.file, offline=offline, progress=progress)
    if not card.file or not card.sha256_prefix:
        missing = "address" if not card.file else "hash"
        raise CheckpointError(
            f"the {missing} of {card.name}'s weights is unknown", hint="pass --checkpoint FILE"
        )
    path = cached_file(card)
    if path.is_file():
        return path
    url = address(card)
    hint = f"download it on another machine and pass --checkpoint {card.file}"
    if _is_offline(offline):
        raise CheckpointError(f"{card.name} is not in the cache and downloads are off", hint=hint)
    from torch.hub import download_url_to_file

    with file_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
    try:
        with file_errors("write", path), _network_errors(url, hint), _stall_timeout(_STALL):
            download_url_to_file(
                url, str(path), hash_prefix=card.sha256_prefix, progress=_shows_bar(progress)
            )
    except RuntimeError as error:
        raise CheckpointError(
            f"{masked(url)} sent a file that differs from the published one: "
            f"{without_secrets(str(error), url)}",
            hint=f"try again, or {hint}",
        ) from _shown_cause(error, url)
    return path


def _shows_bar(wanted: bool) -> bool:
    """Show a progress bar only on a terminal, because it is drawn with carriage returns."""
    return wanted and sys.stderr.isatty()


def _remove_abandoned(path: Path) -> None:
    """Delete the unfinished files that killed downloads of ``path`` have left."""
    _remove_old(path.parent.glob(glob.escape(path.name) + _UNFINISHED))


def _remove_old(files: Iterable[Path]) -> None:
    for unfinished in files:
        with contextlib.suppress(FileNotFoundError):  # another process's download has just ended
            if time.time() - unfinished.stat().st_mtime > _ABANDONED:
                unfinished.unlink()


def _shown_cause(error: Exception, url: str) -> Exception | None:
    """The cause to chain, which --debug shows; None if it may contain a secret of the URL."""
    return error if masked(url) == url else None


@contextlib.contextmanager
def _network_errors(url: str, hint: str) -> Iterator[None]:
    try:
        yield
    except _NETWORK as error:
        reason = str(getattr(error, "reason", None) or error) or type(error).__name__
        raise CheckpointError(
            f"cannot download {masked(url)}: {without_secrets(reason, url)}", hint=hint
        ) from _shown_cause(error, url)


def fetch_hub(
    reference: str, *, both_towers: bool = False, offline: bool = False, progress: bool = True
) -> Path:
    """Download the weights of ``hf://OWNER/NAME`` from the Hugging Face hub; return their path.

    ``model.safetensors`` is preferred to ``pytorch_model.bin``, and both to open_clip's files; for
    ``both_towers`` of a CLIP, open_clip's files come first, because ``model.safetensors`` beside
    them may be timm's, which has the image tower alone.  The repository's ``config.json`` and
    ``preprocessor_config.json``, or ``open_clip_config.json``, are downloaded into the same folder
    if it has them.  ``hf://OWNER/NAME/FILE.index.json`` names the index of weights in shards; it is
    downloaded with all of them.  Files in the cache are not downloaded again.  The bytes of the
    weights must have the SHA-256 that the hub states.

    Raises:
        UsageError: the reference is not a repository, or huggingface_hub is not installed.
        CheckpointError: the repository, a file or a shard does not exist, there is no connection,
            the index names a file outside its folder, or a SHA-256 is another one.
    """
    try:
        repository, index = hub_parts(reference)
    except ValueError as error:
        raise UsageError(
            f"{reference!r} is not a Hugging Face repository",
            hint="write hf://OWNER/NAME, such as hf://timm/NAME, or hf://OWNER/NAME/FILE.index.json",
        ) from error
    download = _hub_download(reference, repository, offline=offline, progress=progress)
    files = dict(sorted(_HUB_FILES.items(), key=_is_open_clip, reverse=both_towers))
    for name, configs in {index: _TRANSFORMERS_CONFIGS}.items() if index else files.items():
        path = download(name, None)
        if path is None:
            continue
        # The other files are of the same commit, and so in the same folder.
        commit = path.parent.name
        for config in configs:
            download(config, commit)
        _check_sha256(reference, path)
        if name.endswith(INDEX):
            _fetch_shards(reference, path, download)
        return path
    where = "is in the cache, and downloads are off" if _is_offline(offline) else "exists"
    raise CheckpointError(
        f"{reference}: none of {index or ', '.join(_HUB_FILES)} {where}",
        hint="check the name, or download a file and pass its path",
    )


# Downloads a file of a repository, of a commit or the newest one; None if there is no such file.
_Download = Callable[[str, str | None], Path | None]


def _hub_download(reference: str, repository: str, *, offline: bool, progress: bool) -> _Download:
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise UsageError(
            "hf:// needs huggingface_hub", hint='pip install "clipdeploy[hub]"'
        ) from error
    # It logs every retry; the final error reports the failure once.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not _shows_bar(progress):
        disable_progress_bars()
    cache, local = _hub_cache(), _is_offline(offline)
    _remove_old((cache / hub_folder(repository) / "blobs").glob("*.incomplete"))

    def download(name: str, commit: str | None) -> Path | None:
        if local:
            # hf_hub_download sends a request of its own even for a file in the cache.
            found = try_to_load_from_cache(repository, name, cache, commit)
            return Path(found) if isinstance(found, str) else None
        try:
            return Path(hf_hub_download(repository, name, revision=commit, cache_dir=cache))
        except LocalEntryNotFoundError as error:
            raise _no_hub(reference, error) from error
        except EntryNotFoundError:
            return None
        # Each version of huggingface_hub lets those of its HTTP library through.
        except Exception as error:
            raise _no_hub(reference, error) from error

    return download


def _fetch_shards(reference: str, index: Path, download: _Download) -> None:
    for name in shard_names(index):
        path = download(name, index.parent.name)
        if path is None:
            raise CheckpointError(
                f"{reference}: the shard {name} that {index.name} names does not exist, or is not "
                "in the cache",
                hint="run again without --offline, or download all shards and pass the index",
            )
        _check_sha256(reference, path)


def _check_sha256(reference: str, path: Path) -> None:
    """Compare a file with the SHA-256 that the hub states, which is the name of its blob.

    Small files have another hash as their name, and file systems without links no blobs.
    """
    stated = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not is_hash(stated) or sha256_file(path) == stated:
        return
    with file_errors("remove", path):
        path.parent.joinpath(os.readlink(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    raise CheckpointError(
        f"{reference}: {path.name} differs from the hub's file, whose SHA-256 starts with "
        f"{stated[:8]}; it was removed from the cache",
        hint="run again to download it again",
    )


def _is_open_clip(item: tuple[str, tuple[str, ...]]) -> bool:
    return item[0] in OPEN_CLIP_NAMES


def _no_hub(reference: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot download {reference}: {first_line(error)}",
        hint="check the name and the connection, or download a file and pass its path",
    )
