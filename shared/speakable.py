"""The one rule for "the input contains no speakable text", used by the web workers and by the engines.

It decides by Unicode categories alone. It changes no text and raises nothing.
"""

import unicodedata
from typing import Final

NO_SPEAKABLE_TEXT: Final = "the input contains no speakable text"
"""The message of the error `invalid_value` for such an input."""


def is_speakable(text: str, *, needs_word: bool = False) -> bool:
    """True if at least one character of `text` can be spoken.

    Characters of the categories C (control, format, surrogate, private, unassigned) and Z (separators) have no sound.
    With `needs_word`, at least one letter or digit of any script must be there. espeak-ng takes any text with a sound:
    it reads emoji aloud and makes a short silence of punctuation. Qwen3-TTS takes only text with a word.
    """
    categories = (unicodedata.category(character)[0] for character in set(text))
    return any(category in "LN" if needs_word else category not in "CZ" for category in categories)
