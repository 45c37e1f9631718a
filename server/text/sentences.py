"""Sentences of a text that is still being written: each comes out as soon as its end is certain."""

import re
from typing import Final, Literal

from shared.text import is_speakable

Granularity = Literal["sentence", "clause"]

_CLOSING: Final = "\"'\u2019\u201d\u00bb)\\]}\u300d\u300f\uff09\u3011"
"""Quotes and brackets that may stand between the end of a sentence and the space behind it."""


def _boundary(spaced: str, unspaced: str) -> re.Pattern[str]:
    """Latin and its like must have a space behind the mark, because of 3.14 and example.com; other scripts have none.

    What decides is the character behind, so nothing is cut before it has come.
    A run of marks is looked at once, from its first one on: 100,000 points would take minutes.
    """
    behind = rf"(?=[^{unspaced}{_CLOSING}])"
    return re.compile(
        rf"(?<![{spaced}])[{spaced}]++[{_CLOSING}]*+(?=\s)|(?<![{unspaced}])[{unspaced}]++[{_CLOSING}]*+{behind}|\n"
    )


_BOUNDARIES: Final[dict[Granularity, re.Pattern[str]]] = {
    "sentence": _boundary(".!?\u2026\u061f\u06d4", "\u3002\uff01\uff1f\u0964\u0965"),
    "clause": _boundary(
        ".!?,;:\u2026\u060c\u061b\u061f\u06d4", "\u3002\uff01\uff1f\uff0c\uff1b\uff1a\u3001\u0964\u0965"
    ),
}


def end_of_last_sentence(text: str) -> int:
    """The number of characters of the sentences of `text` that are complete for certain."""
    return max((match.end() for match in _BOUNDARIES["sentence"].finditer(text)), default=0)


class SentenceSplitter:
    """Cuts a growing text into sentences or clauses; a part without a letter or digit joins the next one."""

    def __init__(self, granularity: Granularity) -> None:
        self._boundary = _BOUNDARIES[granularity]
        self._text = ""
        self._silent = 0
        """Characters at the beginning of the text, up to a boundary, of which none is a letter or digit."""

    def feed(self, text: str) -> list[str]:
        """Take more text; the sentences that are complete now.

        Nothing is looked at twice up to the last boundary: 1,000 times ". " in single characters took 5 s.
        """
        self._text += text
        sentences, start = [], 0
        for match in self._boundary.finditer(self._text, self._silent):
            if is_speakable(self._text[self._silent : match.end()]):
                sentences.append(self._text[start : match.end()].strip())
                start = match.end()
            self._silent = match.end()
        self._text = self._text[start:]
        self._silent -= start
        return sentences

    def rest(self) -> str:
        """The rest of the text, which has ended."""
        rest, self._text, self._silent = self._text.strip(), "", 0
        return rest
