"""Composed letters: as Unicode's NFC, without its worst case."""

import unicodedata

from hypothesis import example, given
from hypothesis import strategies as st

from shared.composition import compose, is_composed, letters


@given(st.text(st.sampled_from("aeo 각ᄀ\u1161\u11a8か\u3099\u0301\u0323ক\u09c7\u09be\u212b"), max_size=30))
@example("x" * 511 + "e\u0301")
@example("x" * 510 + "e\u0301")
def test_as_nfc(text: str) -> None:
    """Whatever the letters are made of, and also where a piece of a check ends."""
    nfc = unicodedata.normalize("NFC", text)
    assert compose(text) == nfc
    assert is_composed(text) == (text == nfc)
    assert "".join(text[start:end] for start, end in letters(text)) == text


def test_a_run_of_marks_has_a_bound() -> None:
    """A letter with thousands of marks is composed in pieces: in one, their sorting would take their square."""
    text = "a" + "\u0315\u0300" * 100_000
    assert max(end - start for start, end in letters(text)) == 32
    assert len(compose(text)) in range(len(text) - 1, len(text) + 1)
