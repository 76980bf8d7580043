"""Addresses as they may be shown: without passwords and tokens."""

from __future__ import annotations

import re
from urllib.parse import unquote

__all__ = ["masked", "without_secrets"]

_HIDDEN = "***"
# scheme://user:password@host/path?query#fragment.  A password with an unquoted / or ? is a mistake,
# and is hidden all the same: everything up to the last @ is.
_ADDRESS = re.compile(
    r"(?P<scheme>[^/?#@]*//)?(?P<user>.*@)?(?P<rest>[^?#]*)(?P<more>.*)", re.DOTALL
)
_VALUE = re.compile(r"[?&#;](?:[^=&#;]*=)?([^&#;]*)")


def masked(address: str) -> str:
    """An address without what may give access: what is before ``@``, after ``?`` and ``#``.

    ``https://ann:key@host/files?token=key`` becomes ``https://***@host/files?***``.
    """
    found = _ADDRESS.fullmatch(address)
    assert found is not None  # every text has this form
    user = f"{_HIDDEN}@" if found["user"] else ""
    more = f"{found['more'][0]}{_HIDDEN}" if found["more"] else ""
    return f"{found['scheme'] or ''}{user}{found['rest']}{more}"


def without_secrets(text: str, address: str) -> str:
    """``text``, such as a library's message about ``address``, without the secrets of that."""
    found = _ADDRESS.fullmatch(address)
    assert found is not None
    text = text.replace(address, masked(address))
    user = (found["user"] or "").removesuffix("@")
    secrets = [user, *user.split(":", 1), *_VALUE.findall(found["more"]), found["more"][1:]]
    for secret in sorted({*secrets, *map(unquote, secrets)}, key=len, reverse=True):
        if secret:
            text = text.replace(secret, _HIDDEN)
    return text
