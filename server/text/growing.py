"""A plain text that is still being written: its text and its pauses, each as soon as more text cannot change it."""

import re
from collections.abc import Sequence
from typing import Final

from server.text import pauses
from server.text.pronunciations import Pronunciations, respell
from server.text.sentences import end_of_last_sentence
from server.text.spans import Pause, copied, text_of
from shared.composition import compose

_LONGEST_MARK: Final = 60
_BEGUN_MARK: Final = re.compile(r"\[\s{0,9}(?:p(?:a(?:u(?:s(?:e(?:\s{0,9}(?::[^\]]{0,40})?)?)?)?)?)?)?", re.IGNORECASE)
"""The beginning of a pause mark."""


class GrowingText:
    """A text in pieces. Joined, what comes out is the whole text; with pronunciations, their respellings are in it.

    A word may have several parts, so with pronunciations the text comes out sentence by sentence.
    """

    def __init__(self, pronunciations: Sequence[Pronunciations]) -> None:
        self._tables = pronunciations
        self._text = ""
        self._total_ms = 0

    def feed(self, text: str) -> list[str | Pause]:
        """Take more text. Raises ApiError (`invalid_value`): a pause is too long."""
        self._text += text
        certain = len(self._text)
        if self._tables:
            certain = end_of_last_sentence(self._text)
        begun = self._text.rfind("[", max(0, certain - _LONGEST_MARK), certain)
        if begun >= 0 and _BEGUN_MARK.fullmatch(self._text, begun, certain):
            certain = begun
        return self._take(certain)

    def rest(self) -> list[str | Pause]:
        """The rest of the text, which has ended."""
        return self._take(len(self._text))

    def _take(self, end: int) -> list[str | Pause]:
        text, self._text = self._text[:end], self._text[end:]
        items: list[str | Pause] = []
        position = 0
        for start, behind, ms in [*pauses.marks(text), (len(text), len(text), 0)]:
            if spoken := self._respelled(text[position:start]):
                items.append(spoken)
            if ms:
                items.append(Pause(ms))
                self._total_ms += ms
            position = behind
        pauses.check_sum(self._total_ms)
        return items

    def _respelled(self, text: str) -> str:
        if not self._tables:
            return text
        text = compose(text)
        return text_of(respell([copied(text, 0, len(text))], self._tables))
