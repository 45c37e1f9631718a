"""Two rules about characters that both sides follow: which texts can be spoken, and which names can be shown.

The rules decide by Unicode categories alone. They change no text and raise nothing.
"""

import unicodedata
from typing import Final

NO_SPEAKABLE_TEXT: Final = "the input contains no speakable text"
"""The message of the error `invalid_value` for such an input."""

JOINERS: Final = dict.fromkeys((0x200C, 0x200D))
"""A table for str.translate that removes zero-width (non-)joiners.

Persian and Indic words and composed emoji need them. They are invisible, and Python calls them unprintable.
"""


def is_speakable(text: str, *, needs_word: bool = False) -> bool:
    """True if at least one character of `text` can be spoken.

    Characters of the categories C (control, format, surrogate, private, unassigned) and Z (separators) have no sound.
    With `needs_word`, at least one letter or digit of any script must be there. espeak-ng takes any text with a sound:
    it reads emoji aloud and makes a short silence of punctuation. Qwen3-TTS takes only text with a word.
    """
    categories = (unicodedata.category(character)[0] for character in set(text))
    return any(category in "LN" if needs_word else category not in "CZ" for category in categories)


def is_printable(name: str) -> bool:
    """True if `name` has a visible character, and none that steers a terminal or the direction of writing."""
    visible = name.translate(JOINERS)
    return bool(visible.strip()) and visible.isprintable()
