"""Rules about characters that both sides follow: which texts can be spoken, and which names can be shown.

The rules decide by Unicode categories, and by the control tokens of Qwen3-TTS. They change no text and raise nothing.
"""

import re
import unicodedata
from typing import Final

NO_SPEAKABLE_TEXT: Final = "the input contains no speakable text"
"""The message of the error `invalid_value` for such an input."""

JOINERS: Final = dict.fromkeys((0x200C, 0x200D))
"""A table for str.translate that removes zero-width (non-)joiners.

Persian and Indic words and composed emoji need them. They are invisible, and Python calls them unprintable.
"""

MAX_INPUT_CHARS: Final = 1_000_000
"""The largest TTS_MAX_INPUT_CHARS."""

MAX_RESPELLED: Final = 2
"""Pronunciations may make a text so many times as long as TTS_MAX_INPUT_CHARS."""


CONTROL_TOKEN: Final = re.compile(r"<\|[^<>|]*\|>|<tts_[a-z_]*>")
"""Text that the tokenizer of Qwen3-TTS would turn into control tokens of the prompt. No engine speaks it."""


def is_blank(text: str) -> bool:
    """True if `text` has nothing visible: only white space, control and format characters, and surrogates.

    Characters that Python's Unicode does not know yet count as visible: they may be new emoji.
    """
    categories = (unicodedata.category(character) for character in set(text))
    return all(category in {"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"} for category in categories)


def is_speakable(text: str) -> bool:
    """True if `text` has at least one letter or digit of any script.

    The rule is the same for every engine, although espeak-ng would read emoji and many signs aloud:
    a client that sends its sentences one by one gets one answer for `---`, whichever model speaks.
    """
    characters = set(CONTROL_TOKEN.sub(" ", text))
    return any(unicodedata.category(character)[0] in "LN" for character in characters)


def transcript_of(text: str | None) -> str | None:
    """`text` as the transcript of a recording; None if there is nothing to say in it."""
    text = (text or "").strip()
    return text if is_speakable(text) else None


def is_printable(name: str) -> bool:
    """True if `name` has a visible character, and none that steers a terminal or the direction of writing."""
    visible = name.translate(JOINERS)
    return bool(visible.strip()) and visible.isprintable()
