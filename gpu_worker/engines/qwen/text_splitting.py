"""Text to speak: cleaned, checked, and split into utterances that a slot can hold.

It owns no models: token counts come from the caller. Sentence boundaries are found by the sentencex library.
"""

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Final

import sentencex

from gpu_worker.engines.base import JobError
from shared.speakable import NO_SPEAKABLE_TEXT, is_speakable

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
"""sentencex's names for the published languages; any other text is split by its rules for English."""

_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>|<tts_[a-z_]*>")
"""What the tokenizer would take for control tokens of the prompt."""

# The escapes are the full-width comma, semicolon and colon, and the ideographic comma.
_CLAUSE_END = re.compile(r"(?<=[,;:\uff0c\uff1b\uff1a\u3001])\s*|\s+")


HEAD: Final = 8
"""Characters a token that are enough to see that a text has too many tokens: text has 1 to 5, runs of spaces more."""


def tidy(text: str) -> str:
    """The text with spaces for control characters and control tokens, else as it was written."""
    text = _SPECIAL_TOKEN.sub(" ", text)
    controls = {ord(character): " " for character in set(text) if _is_control(character)}
    return text.translate(controls) if controls else text


def clean(text: str) -> str:
    """The tidy text without outer white space.

    Raises:
        JobError: `invalid_value` where no letter or digit of any script is left to say.
    """
    text = tidy(text).strip()
    if not is_speakable(text, needs_word=True):
        raise JobError("invalid_value", NO_SPEAKABLE_TEXT, param="input")
    return text


def fits(text: str, limit: int, count: Callable[[str], int]) -> bool:
    """Whether a text has at most `limit` tokens by `count`, looking at no more of it than that takes.

    Counting takes 1 ms for 4000 characters: too long to count 100,000 while others speak.
    """
    if len(text.encode()) <= limit:  # a token is at least one byte of UTF-8
        return True
    head = text[: HEAD * limit]
    return count(head) <= limit and (head == text or count(text) <= limit)


def split(text: str, language: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """Cut a clean text into utterances of at most `limit` tokens by `count`, at sentence ends where possible.

    A text within the limit stays whole. A sentence beyond it is cut at clauses or between words, then anywhere.
    Each utterance is looked for when it is asked for: 1 to 3 ms of the thread that everybody's frames come from.
    """
    if fits(text, limit, count):
        yield text
        return
    current = ""
    most = 0  # tokens that `current` has at most
    for piece in _pieces(text, language, limit, count):
        joined = current + piece
        most += len(piece.encode())
        if most > limit and current:
            utterance = joined.strip()
            tokens = count(utterance or ".")
            most = tokens + len(joined.encode()) - len(utterance.encode())
            if tokens > limit:
                if is_speakable(current, needs_word=True):
                    yield current.strip()
                joined = piece
                most = len(piece.encode())
        current = joined
    if is_speakable(current, needs_word=True):
        yield current.strip()


def _pieces(text: str, language: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    """What utterances are put together from: sentences, and the parts of those that are too long."""
    for sentence in sentencex.segment(_LANGUAGE_CODES.get(language, "en"), text):
        if fits(sentence.strip(), limit, count):
            yield sentence
            continue
        start = 0
        for end in itertools.chain((match.end() for match in _CLAUSE_END.finditer(sentence)), [len(sentence)]):
            part = sentence[start:end]
            start = end
            # A token is at least one byte of UTF-8, so this many characters are within the limit.
            step = len(part) if fits(part.strip(), limit, count) else max(1, limit // 4)
            yield from (part[i : i + step] for i in range(0, len(part), max(step, 1)))


def _is_control(character: str) -> bool:
    """Control characters (line ends and tabs aside), surrogates and private or unassigned ones."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
