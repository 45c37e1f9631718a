"""Text of requests: control characters removed, and long texts split into utterances.

Token counts come from the caller: this module knows no tokenizer.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Final

from gpu_worker.engines.sentences import sentences_of
from shared.text import CONTROL_TOKEN, is_speakable

_LANGUAGE_CODES: Final = {
    "chinese": "zh",
    "english": "en",
    "german": "de",
    "italian": "it",
    "portuguese": "pt",
    "spanish": "es",
    "japanese": "ja",
    "korean": "ko",
    "french": "fr",
    "russian": "ru",
}
"""sentencex's codes for the languages of the published models. All other text is split by its rules for English."""

# The escapes are the full-width comma, semicolon and colon, and the ideographic comma.
CLAUSE_END = re.compile(r"(?<=[,;:\uff0c\uff1b\uff1a\u3001])\s*|\s+")


MAX_CHARS_PER_TOKEN: Final = 8
"""A head of this many characters a token is enough to see that a text has too many tokens.

A token has 1 to 5 characters, in runs of spaces more.
"""


def remove_controls(text: str) -> str:
    """Replace control characters and control tokens by spaces; all else stays as written."""
    text = CONTROL_TOKEN.sub(" ", text)
    controls = {ord(character): " " for character in set(text) if _is_control(character)}
    return text.translate(controls) if controls else text


def clean_text(text: str) -> str:
    """The text without control characters, control tokens and outer white space; "" if no letter or digit is left."""
    text = remove_controls(text).strip()
    return text if is_speakable(text) else ""


def fits_tokens(text: str, limit: int, count: Callable[[str], int]) -> bool:
    """True if `text` has at most `limit` tokens by `count`. Counts no more of the text than necessary.

    Counting takes 1 ms for 4000 characters, so counting 100,000 would delay the frames of the other jobs.
    """
    if len(text.encode()) <= limit:  # a token has at least one byte of UTF-8
        return True
    head = text[: MAX_CHARS_PER_TOKEN * limit]
    return count(head) <= limit and (head == text or count(text) <= limit)


def split_into_utterances(text: str, language: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """Split a clean text into utterances of at most `limit` tokens by `count`, at sentence ends where possible.

    A text within the limit stays whole. A longer sentence is split at clauses or between words, else anywhere.
    Each utterance is searched for when it is asked for. That takes 1 to 3 ms of the thread that makes all frames.
    """
    if fits_tokens(text, limit, count):
        yield text
        return
    packer = UtterancePacker(limit, count)
    for piece in _pieces(text, language, limit, count):
        utterance = packer.add(piece)
        if utterance is not None:
            yield utterance
    if is_speakable(packer.current):
        yield packer.current.strip()


class UtterancePacker:
    """Packs the pieces of a text into utterances of at most `limit` tokens. `current` is the one that is not full."""

    def __init__(self, limit: int, count: Callable[[str], int]) -> None:
        self._limit = limit
        self._count = count
        self._most = 0  # upper bound of the tokens of `current`
        self.current = ""

    def add(self, piece: str) -> str | None:
        """Add a piece; returns the utterance that ends before it, unless there is none, or nothing to say in it."""
        joined = self.current + piece
        self._most += len(piece.encode())
        full = None
        if self._most > self._limit and self.current:
            utterance = joined.strip()
            tokens = self._count(utterance or ".")
            self._most = tokens + len(joined.encode()) - len(utterance.encode())
            if tokens > self._limit:
                full = self.current.strip() if is_speakable(self.current) else None
                joined = piece
                self._most = len(piece.encode())
        self.current = joined
        return full


def split_sentences(text: str, language: str) -> list[str]:
    """The sentences of a text, with the white space behind them."""
    return sentences_of(text, _LANGUAGE_CODES.get(language, "en"))


def part_chars(limit: int) -> int:
    """Characters of the parts of a word that is too long: a token has at least a byte, a character at most 4."""
    return max(1, limit // 4)


def _pieces(text: str, language: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """The sentences of a text. A sentence beyond the limit comes in parts."""
    for sentence in split_sentences(text, language):
        if fits_tokens(sentence.strip(), limit, count):
            yield sentence
            continue
        start = 0
        for end in itertools.chain((match.end() for match in CLAUSE_END.finditer(sentence)), [len(sentence)]):
            part = sentence[start:end]
            start = end
            step = len(part) if fits_tokens(part.strip(), limit, count) else part_chars(limit)
            yield from (part[i : i + step] for i in range(0, len(part), max(step, 1)))


def _is_control(character: str) -> bool:
    """True for control characters (except line ends and tabs), surrogates, and private or unassigned characters."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
