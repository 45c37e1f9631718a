"""Composed letters: as Unicode's NFC, without its worst case."""

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shared.composition import compose, is_composed, letters


def parts(text: str) -> list[str]:
    """The letters, each with its marks."""
    return [text[start:end] for start, end in letters(text)]


@given(st.text(st.sampled_from("aeo 각ᄀ\u1161\u11a8か\u3099\u0301\u0323ক\u09c7\u09be\u212b"), max_size=30))
@example("x" * 511 + "e\u0301")
@example("x" * 510 + "e\u0301")
def test_as_nfc(text: str) -> None:
    """Each letter that NFC makes shorter, whatever it is made of, and also where a piece of a check ends."""
    composed = compose(text)
    assert unicodedata.normalize("NFC", text) == unicodedata.normalize("NFC", composed)
    assert compose(composed) == composed
    assert all(len(unicodedata.normalize("NFC", letter)) >= len(letter) for letter in parts(composed))
    assert is_composed(text) <= (composed == text)
    assert "".join(parts(text)) == text


@pytest.mark.parametrize("text", ["e\u0323\u0302", "ᄀ\u1161\u11a8", "か\u3099", "ক\u09c7\u09be", "\u212b", "\uf900"])
def test_one_letter(text: str) -> None:
    """It is one character."""
    assert compose(f"x{text}y") == f"x{unicodedata.normalize('NFC', text)}y"
    assert len(compose(text)) in {1, 2}  # the Bengali vowel stays behind its consonant


@pytest.mark.parametrize(
    "text",
    [
        "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
        "\u05e9\u05c1\u05b7\u05d1\u05bc\u05b8\u05ea",
        "\u09a8\u09bf\u09df\u09c7",
        "\u09b9\u09df",
    ],
)
def test_marks_stay_as_they_were_typed(text: str) -> None:
    """NFC sorts the marks of Arabic and Hebrew, and takes a Bengali letter apart; espeak-ng misreads both."""
    assert unicodedata.normalize("NFC", text) != text
    assert compose(f"é {text} e\u0301") == f"é {text} é"


def test_a_run_of_marks_has_a_bound() -> None:
    """A letter with thousands of marks is composed in pieces: in one, their sorting would take their square."""
    text = "a" + "\u0315\u0300" * 100_000
    assert max(end - start for start, end in letters(text)) == 32
    assert len(compose(text)) in range(len(text) - 1, len(text) + 1)
