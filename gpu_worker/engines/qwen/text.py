"""Text to speak: cleaned, checked, and split into utterances that a slot can hold.

It owns no models: token counts come from the caller. Sentence boundaries are found by the sentencex library.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Final

import sentencex

from gpu_worker.engines.base import JobError

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


def clean(text: str) -> str:
    """The text without control characters, control tokens and outer white space.

    Raises:
        JobError: `invalid_value` where no letter or digit of any script is left to say.
    """
    text = _SPECIAL_TOKEN.sub(" ", text)
    text = "".join(" " if _is_control(character) else character for character in text).strip()
    if not any(unicodedata.category(character)[0] in "LN" for character in text):
        raise JobError("invalid_value", "there is nothing to say: no letter or digit in the text", param="input")
    return text


def split(text: str, language: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Cut a clean text into utterances of at most `limit` tokens by `count`, at sentence ends where possible.

    A text within the limit stays whole. A sentence beyond it is cut at clauses, then between words, then anywhere.
    """
    if count(text) <= limit:
        return [text]
    utterances: list[str] = []
    current = ""
    for piece in _pieces(text, language, limit, count):
        joined = current + piece
        if current and count(joined.strip()) > limit:
            utterances.append(current.strip())
            joined = piece
        current = joined
    utterances.append(current.strip())
    return [utterance for utterance in utterances if any(unicodedata.category(c)[0] in "LN" for c in utterance)]


def _pieces(text: str, language: str, limit: int, count: Callable[[str], int]) -> Iterator[str]:
    for sentence in sentencex.segment(_LANGUAGE_CODES.get(language, "en"), text):
        if count(sentence.strip() or ".") <= limit:
            yield sentence
            continue
        start = 0
        ends = [match.end() for match in _CLAUSE_END.finditer(sentence) if match.end()]
        for end in [*ends, len(sentence)]:
            part = sentence[start:end]
            start = end
            # A token is at least one byte of UTF-8, so this many characters are within the limit.
            step = len(part) if count(part.strip() or ".") <= limit else max(1, limit // 4)
            yield from (part[i : i + step] for i in range(0, len(part), max(step, 1)))


def _is_control(character: str) -> bool:
    """Control characters (line ends and tabs aside), surrogates and private or unassigned ones."""
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs", "Co", "Cn")
