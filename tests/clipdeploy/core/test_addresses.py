from __future__ import annotations

import pytest

from clipdeploy.core.addresses import masked, without_secrets
from clipdeploy.core.errors import CheckpointError
from clipdeploy.models import cards
from clipdeploy.models.download import address, fetch

SHOWN = {
    "https://host/path": "https://host/path",
    "http://127.0.0.1:8000/a/b": "http://127.0.0.1:8000/a/b",
    "file:///data/clip": "file:///data/clip",
    "https://ann:s3cret@host/path": "https://***@host/path",
    "https://s3cret@host/path": "https://***@host/path",
    "https://ann:s3/cret@host/path": "https://***@host/path",
    "https://ann:s3?cret@host": "https://***@host",
    "https://ann:s3@cret@host": "https://***@host",
    "ann:s3cret@host/path": "***@host/path",
    "https://host/path?sig=s3cret&expires=9": "https://host/path?***",
    "https://host/path#s3cret": "https://host/path#***",
    "https://ann:s3cret@host:81/a?x=s3cret#s3cret": "https://***@host:81/a?***",
    "": "",
}


@pytest.mark.parametrize("text", SHOWN)
def test_an_address_is_shown_without_secrets(text: str) -> None:
    assert masked(text) == SHOWN[text]


def test_a_librarys_message_about_it() -> None:
    url = "http://ann:s3cret%21@host/a?token=t0ken"
    for said in (
        "nonnumeric port: 's3cret%21@host'",
        f"<{url}> not found",
        "password s3cret!",
        "t0ken is no token",
    ):
        cleaned = without_secrets(said, url)
        assert not any(secret in cleaned for secret in ("s3cret", "t0ken")), cleaned
    assert without_secrets("timed out", "http://host/") == "timed out"


@pytest.mark.parametrize(
    "mirror",
    [
        "http://ann:s3cret@127.0.0.1:9/clip",
        "http://127.0.0.1:9/clip?token=s3cret",
        "nothing://ann:s3cret@host",
        "http://ann:s3cret@",
        "http://ann:s3 cret@host:x",
    ],
)
def test_no_error_of_a_download_has_them(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", mirror)
    monkeypatch.delenv("CLIPDEPLOY_OFFLINE")
    with pytest.raises(CheckpointError, match="cannot download") as found:
        fetch(cards.find("clip-vit-base-p32"), progress=False)
    assert "s3" not in str(found.value)
    assert "***" in str(found.value)
    # With --debug Python would show the library's own message.
    assert found.value.__cause__ is None
    assert found.value.__suppress_context__


def test_the_file_is_named_before_the_query(monkeypatch: pytest.MonkeyPatch) -> None:
    card = cards.find("clip-vit-base-p32")
    monkeypatch.setenv("CLIPDEPLOY_MIRROR", "https://host/clip/?token=t")
    assert address(card) == f"https://host/clip/{card.file}?token=t"
