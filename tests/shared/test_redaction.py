"""The secrets that are taken out of texts for others."""

from collections.abc import Iterator

import pytest

from shared import redaction
from shared.redaction import keep_secret, redact


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process knows no secrets of other tests, and of this one none after it."""
    monkeypatch.setattr(redaction, "_secrets", set())
    pattern = redaction._pattern
    keep_secret([])
    yield
    monkeypatch.undo()
    redaction._pattern = pattern


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no key", "no key"),
        ("voice 'sk-tts-a_B-c' is unknown", "voice 'sk-tts-…' is unknown"),
        ("GET /SK-TTS-ABC/x sk-tts-d", "GET /SK-TTS-…/x sk-tts-…"),
        ("sk-tts-", "sk-tts-"),
    ],
)
def test_keys_by_their_form(text: str, shown: str) -> None:
    """Keys of `key new` are recognised in any process."""
    assert redact(text) == shown


def test_secrets_of_any_form() -> None:
    """The longer one first; case does not matter; a word is not taken for a secret."""
    keep_secret(["my.secret", "my.secret+longer", "word", ""])
    assert redact("my.secret my.secret+longer MY.SECRET myxsecret a word") == "… … … myxsecret a word"
    keep_secret(["another-secret"])
    assert redact("my.secret another-secret sk-tts-a") == "… … sk-tts-…"
