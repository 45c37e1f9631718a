"""The sentences of texts that clients may send, whatever is in them."""

import sys
import unicodedata

import pytest
import sentencex
from hypothesis import given
from hypothesis import strategies as st

from gpu_worker.engines.sentences import sentences_of

SPACES = "".join(filter(str.isspace, map(chr, range(sys.maxunicode + 1))))
LANGUAGES = ("en", "zh", "de", "fr", "ja", "ru")


@pytest.mark.parametrize("space", SPACES, ids=[f"U+{ord(space):04X}" for space in SPACES])
def test_white_space_before_a_full_stop(space: str) -> None:
    """A no-break space may stand there in an honest text. It stays as it is."""
    for language in LANGUAGES:
        text = f"He takes vitamin A{space}. And B{space}.{space}Then he goes."
        assert "".join(sentences_of(text, language)) == text


@given(st.lists(st.sampled_from(["A", "b", ".", "?", "。", "(", "”", "\u0301", "Mr. ", "1) ", "\n\n", *SPACES])))
def test_nothing_is_lost(parts: list[str]) -> None:
    """The sentences are the whole text, to the last character."""
    text = "".join(parts)
    for language in LANGUAGES:
        assert "".join(sentences_of(text, language)) == text


def test_a_space_is_a_space() -> None:
    """The sentences are the same, whichever space stands between them."""
    text = "One is here. Two is there! Is it?"
    for space in filter(lambda space: unicodedata.category(space) == "Zs", SPACES):
        spaced = text.replace(" ", space)
        assert [one.replace(space, " ") for one in sentences_of(spaced, "en")] == sentences_of(text, "en")


class PanicException(BaseException):
    """As Rust raises it: no Exception."""


def test_a_panic_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is one sentence then, and its words part it."""

    def fail(_language: str, _text: str) -> list[str]:
        raise PanicException

    monkeypatch.setattr(sentencex, "segment", fail)
    assert sentences_of("One. Two.", "en") == ["One. Two."]
