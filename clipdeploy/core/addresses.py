"""Removes passwords and tokens from URLs before they are shown."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["masked", "without_secrets"]

_HIDDEN = "***"
# scheme://user:password@host/path?query#fragment.  Everything up to the last @ is hidden, so that a
# password with an unquoted / or ? is hidden too.
_ADDRESS = re.compile(
    r"(?P<scheme>[^/?#@]*//)?(?P<user>.*@)?(?P<rest>[^?#]*)(?P<more>.*)", re.DOTALL
)
_VALUE = re.compile(r"[?&#;](?:[^=&#;]*=)?([^&#;]*)")


def masked(address: str) -> str:
    """Return a URL with credentials, query and fragment replaced by ``***``.

    ``https://ann:key@host/files?token=key`` becomes ``https://***@host/files?***``.
    """
    found = _ADDRESS.fullmatch(address)
    assert found is not None  # matches every string
    user = f"{_HIDDEN}@" if found["user"] else ""
    more = f"{found['more'][0]}{_HIDDEN}" if found["more"] else ""
    return f"{found['scheme'] or ''}{user}{found['rest']}{more}"


def without_secrets(text: str, address: str) -> str:
    """Return ``text``, such as an error message, with the secrets of ``address`` replaced."""
    found = _ADDRESS.fullmatch(address)
    assert found is not None
    text = text.replace(address, masked(address))
    user = (found["user"] or "").removesuffix("@")
    secrets = [user, *user.split(":", 1), *_VALUE.findall(found["more"]), found["more"][1:]]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if secret:
            text = text.replace(secret, _HIDDEN)
    return text
