"""Composed letters: é as one character, not as e and an accent, which macOS and PDF files have.

Tables of pronunciations know the composed form. espeak-ng speaks both parts of the other one.
Unicode's NFC does more, and espeak-ng then misreads vowels: it sorts the marks of Arabic and Hebrew, and takes some
letters of Bengali apart. So only what becomes fewer characters is composed.
To compose a run of n marks takes n² steps, so texts are composed letter by letter, and a letter has a limit.
"""

import unicodedata
from collections.abc import Iterator
from typing import Final

_MAX_LETTER: Final = 32
"""Characters of a letter with its marks; Unicode's stream-safe texts have no longer ones."""

_CHECKED_CHARS: Final = 512
"""Characters that are looked at together."""


def is_composed(text: str) -> bool:
    """True if `compose` would change nothing. It may be False where it would change nothing either."""
    return text.isascii() or all(
        unicodedata.is_normalized("NFC", text[start : start + _CHECKED_CHARS + 1])  # one more: the mark of the last
        for start in range(0, len(text), _CHECKED_CHARS)
    )


def compose(text: str) -> str:
    """The text with composed letters."""
    if is_composed(text):
        return text
    return "".join(compose_letter(text[start:end]) for start, end in letters(text))


def compose_letter(letter: str) -> str:
    """The letter with its marks in fewer characters, or in another one; as it is if there is no such form."""
    composed = unicodedata.normalize("NFC", letter)
    return composed if len(composed) <= max(len(letter) - 1, 1) else letter


def letters(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each character with the marks, or the parts of a Korean syllable, that follow it."""
    start = 0
    for index, character in enumerate(text):
        goes_on = unicodedata.category(character).startswith("M") or "\u1160" <= character <= "\u11ff"
        if index > start and (not goes_on or index - start == _MAX_LETTER):
            yield start, index
            start = index
    if text:
        yield start, len(text)
