"""The utterances of a text while it grows: those of the whole text, as early as they are sure.

IncrementalSplitter gives the utterances that split_into_utterances gives, for a text whose end is not known.
This module knows neither jobs nor tensors.

These are sure; everything else is held back:

- A sentence end, once the next word is complete, because sentencex reads that word. Of a word of letters without case
  one letter is enough: sentencex has no lists of such words. While a quotation or a bracket is open, the sentence ends
  in it are held back, because sentencex passes over them if it is ever closed. Behind what may be an item of a list
  all is held back until the paragraph ends: the next item shows sentencex that it is one.
- An utterance, once a sentence follows that finds no room in it.
- The beginning of an utterance: its complete sentences. The next one is held back until it is complete, because its
  length decides whether the utterance has room for it.
- Of the text's first sentence, the complete words and clauses: wherever the sentence is parted, they come first.
  Before the first of them, as many characters as are never parted.
- Of a sentence longer than any utterance, the complete words and clauses.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from gpu_worker.engines.qwen.text_splitting import CLAUSE_END, UtterancePacker, fits_tokens, part_chars, split_sentences
from shared.text import is_speakable

_CLOSERS: Final = "\"''`»’‚”‛“«‟›》」)]}>）"  # noqa: RUF001 -- the signs themselves
"""Each sign that closes a quotation or a bracket for sentencex. Behind a text, they close whatever is open in it."""

_LIST_ITEM: Final = re.compile(
    r"(?<![^\s])(?:[\u2022-\u2bff]|\([0-9A-Za-z]+\)|(?:[0-9]+|[A-Za-z]|[ivxlcdmIVXLCDM]+)\.?\))(?=\s|\Z)"
    r"|^[^\S\n]*(?:[*+-]|(?:[0-9]+|[a-z]|[ivxlcdmIVXLCDM]+)\.)(?=\s|\Z)",
    re.MULTILINE,
)
"""The marks that sentencex reads as items of a list if a paragraph has two: `2)` anywhere, `2.` in a line."""

_LETTER: Final = re.compile(r"\w")
_SPACE: Final = re.compile(r"\s")


class IncrementalSplitter:
    """Splits a clean text that grows by `update`. Call `next_utterance` until it gives None, then `beginning`."""

    def __init__(
        self, language: str, limit: int, count: Callable[[str], int], settled: Callable[[str], Sequence[int]]
    ) -> None:
        """`limit`: the most tokens of an utterance, by `count`. `settled`: tokens of a text whatever follows it."""
        self._language = language
        self._limit = limit
        self._count = count
        self._settled = settled
        self._packer = UtterancePacker(limit, count)
        self._text = ""
        self._closed = False
        self._place = 0  # where the next piece begins
        self._long_sentence: int | None = None  # where the sentence beyond the limit begins that is being parted
        self._long_part: int | None = None  # where the word or clause beyond the limit begins that is being parted
        self._sentence_ends: list[int] = []
        self._unsure_end = 0  # no sentence end that is not sure yet lies before this place
        self._beginning = 0

    def update(self, text: str, *, closed: bool) -> None:
        """`text` is all that there is now, the former text and what came behind it. `closed`: it is complete."""
        self._text, self._closed = text, closed
        ends = _places(split_sentences(text, self._language))
        if closed:
            self._sentence_ends, self._unsure_end = ends, len(text)
            return
        while_open = set(_places(split_sentences(text + _CLOSERS, self._language)))
        sure = [end for end in ends[:-1] if end in while_open and self._next_word_is_sure(end)]
        unsure = [end for end in {*ends[:-1], *while_open}.difference(sure) if end < len(text)]
        marks = (
            place + 1
            for place in range(self._place, len(text))
            if unicodedata.category(text[place]) == "Po" and not self._next_word_is_sure(place + 1)
        )
        item = _LIST_ITEM.search(text, text.rfind("\n\n") + 1)
        self._unsure_end = min([*unsure, next(marks, len(text)), item.start() if item else len(text)])
        self._sentence_ends = [end for end in sure if end <= self._unsure_end]

    def next_utterance(self) -> str | None:
        """The next utterance that is sure; None if more text has to come first, or behind the last one."""
        while (piece := self._next_piece()) is not None:
            utterance = self._packer.add(piece)
            if utterance is not None:
                return utterance
        if not self._closed:
            return None
        rest, self._packer = self._packer.current, UtterancePacker(self._limit, self._count)
        return rest.strip() if is_speakable(rest) else None

    def beginning(self) -> str:
        """The text with which the next utterance begins, whatever follows; "" before its first letter or digit.

        White space may follow it that is not part of the utterance.
        """
        begun = self._packer.current.lstrip() if self._place else self._text[: self._sure_beginning()]
        return begun if is_speakable(begun) else ""

    def _sure_beginning(self) -> int:
        """How much of the text's first sentence is sure."""
        known = self._text[: self._unsure_end]
        ends = [match.end() for match in CLAUSE_END.finditer(known)]
        if self._text[len(known) :][:1].isspace():
            ends.append(len(known))
        for end in ends:
            if end <= self._beginning:
                continue
            if not fits_tokens(known[:end].strip(), self._limit, self._count):
                break
            self._beginning = end
        return self._beginning or min(len(known), part_chars(self._limit))

    def _next_piece(self) -> str | None:
        """The next piece that split_into_utterances would pack; None if none is sure."""
        start = self._place
        if start == len(self._text):
            return None
        if self._long_sentence is None:
            end = self._end_of_sentence(start)
            if end is not None and self._fits(start, end):
                return self._take(end)
            if end is None and not self._is_too_long(start):
                return None
            self._long_sentence = start
        return self._next_part(start, self._long_sentence)

    def _next_part(self, start: int, sentence: int) -> str | None:
        """The next piece of the long sentence that begins at `sentence`."""
        sentence_end = self._end_of_sentence(sentence)
        if self._long_part is None:
            end = self._end_of_part(sentence, start, sentence_end)
            if end is not None and self._fits(start, end):
                return self._take(end, sentence_end)
            if end is None and not self._is_too_long(start):
                return None
            self._long_part = start
        part_end = self._end_of_part(sentence, self._long_part, sentence_end)
        end = min(start + part_chars(self._limit), len(self._text) if part_end is None else part_end)
        if part_end is None and (end > self._unsure_end or end < start + part_chars(self._limit)):
            return None
        if end == part_end:
            self._long_part = None
        return self._take(end, sentence_end)

    def _fits(self, start: int, end: int) -> bool:
        """True if an utterance can take all that lies before `end`."""
        return fits_tokens(self._text[start:end].strip(), self._limit, self._count)

    def _take(self, end: int, sentence_end: int | None = None) -> str:
        """The piece from `_place` to `end`. With it ends the long sentence that ends there."""
        piece, self._place = self._text[self._place : end], end
        if end == sentence_end:
            self._long_sentence = None
        return piece

    def _end_of_sentence(self, start: int) -> int | None:
        return next((end for end in self._sentence_ends if end > start), None)

    def _end_of_part(self, sentence: int, start: int, sentence_end: int | None) -> int | None:
        """The end of the word or clause at `start`, in the sentence that begins at `sentence`; None if that is open."""
        known = self._text[sentence : self._unsure_end if sentence_end is None else sentence_end]
        for match in CLAUSE_END.finditer(known):
            end = sentence + match.end()
            if end > start and (sentence_end is not None or match.end() < len(known)):
                return end
        return sentence_end

    def _is_too_long(self, start: int) -> bool:
        """True if what begins at `start` has too many tokens, whatever follows."""
        known = self._text[start : self._unsure_end].strip()
        return len(known.encode()) > self._limit and len(self._settled(known)) > self._limit

    def _next_word_is_sure(self, place: int) -> bool:
        """True if the word behind `place` is complete, or as good as complete."""
        letter = _LETTER.search(self._text, place)
        if letter is None:
            return False
        return unicodedata.category(letter[0]) == "Lo" or _SPACE.search(self._text, letter.end()) is not None


class SingleUtteranceSplitter:
    """Does not split: the text is one utterance, however long. The methods are those of IncrementalSplitter."""

    def __init__(self) -> None:
        self._text = ""
        self._closed = False

    def update(self, text: str, *, closed: bool) -> None:
        """As IncrementalSplitter.update."""
        self._text, self._closed = text, closed

    def next_utterance(self) -> str | None:
        """The text, once it is complete."""
        if not self._closed or not self._text:
            return None
        text, self._text = self._text, ""
        return text

    def beginning(self) -> str:
        """All that there is."""
        return self._text


def _places(parts: Sequence[str]) -> list[int]:
    """The end of each part."""
    ends, end = [], 0
    for part in parts:
        end += len(part)
        ends.append(end)
    return ends
