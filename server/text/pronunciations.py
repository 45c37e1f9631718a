"""Pronunciations: words that are spoken as another spelling says. Those of the service, and those of a request.

Words are found whole, in any case; several words and signs may be one entry (`Node.js`, `New York`).
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from server.text.spans import Span, split, text_of
from shared.access import read_file
from shared.catalog import load_catalog
from shared.composition import compose

MAX_FILE_BYTES: Final = 1_000_000
MAX_ENTRIES_OF_A_LANGUAGE: Final = 10_000

Word = Annotated[str, Meta(min_length=1, max_length=100)]
Respelling = Annotated[str, Meta(max_length=200)]

EVERY_LANGUAGE: Final = "all"
"""The table of the service's file that holds in every language."""

# Scripts without spaces between their words: there, each character is a word by itself.
_UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_TOKEN: Final = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|\s+|.", re.DOTALL)

_Trie = dict[str | None, Any]
"""A token of a word -> what may follow; None -> the respelling of the word that ends here."""


class PronunciationsError(Exception):
    """The file cannot be used; the message names it."""


_Token = tuple[int, int, str]
"""Start and end in the text, and the spelling that is compared."""


class Pronunciations:
    """Words and their respellings."""

    def __init__(self, entries: Mapping[str, str]) -> None:
        self._trie: _Trie = {}
        self.count = len(entries)
        for word, respelling in entries.items():
            node = self._trie
            for _, _, spelling in _tokens(compose(word.strip())):
                node = node.setdefault(spelling, {})
            node[None] = compose(respelling)

    def find(self, tokens: Sequence[_Token], first: int, text: str) -> tuple[int, str] | None:
        """The longest word that begins with the token `first`: the token behind it, and its respelling."""
        node: _Trie | None = self._trie
        found = None
        for index in range(first, len(tokens)):
            _, end, spelling = tokens[index]
            node = node.get(spelling) if node else None
            if node is None:
                break
            if None in node and not _goes_on(text, end):
                found = index + 1, node[None]
        return found


def respell(spans: Sequence[Span], tables: Sequence[Pronunciations]) -> Iterator[Span]:
    """The spans with each word of `tables` replaced; an earlier table counts before a later one.

    A new span stands for the whole of the old word.
    """
    text = text_of(spans)
    found = list(_find(text, tables))
    borders = [border for start, end, _ in found for border in (start, end)]
    respellings = iter(found)
    for number, piece in enumerate(split(spans, borders)):
        if number % 2:
            yield Span(next(respellings)[2], piece[0].start, piece[-1].end, rate=piece[0].rate)
        else:
            yield from piece


@functools.cache
def load_pronunciations(path: Path | None) -> dict[str, Pronunciations]:
    """The tables of the service's TOML file: a language's name or code, or EVERY_LANGUAGE -> its words.

    A process reads the file once, when it starts. Without a file there are none. Raises PronunciationsError.
    """
    if path is None:
        return {}
    try:
        tables = msgspec.toml.decode(read_file(path, MAX_FILE_BYTES), type=dict[str, dict[Word, Respelling]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        form = 'the file has a table for each language: [en], and in it word = "respelling"'
        raise PronunciationsError(f"{path}: {error}; {form}") from error
    except ValueError as error:
        raise PronunciationsError(str(error)) from error
    catalog = load_catalog()
    for language, entries in tables.items():
        if language != EVERY_LANGUAGE and not any(spec.language(language) for spec in catalog):
            form = f"a table is named by a language, such as [en] or [german], or [{EVERY_LANGUAGE}]"
            raise PronunciationsError(f"{path}: no model speaks [{language}]; {form}")
        if len(entries) > MAX_ENTRIES_OF_A_LANGUAGE:
            raise PronunciationsError(f"{path}: [{language}] has more than {MAX_ENTRIES_OF_A_LANGUAGE} entries")
    return {language: Pronunciations(entries) for language, entries in tables.items()}


def check_pronunciations(path: Path | None) -> None:
    """PronunciationsError if the file cannot be used now."""
    load_pronunciations.__wrapped__(path)


def reload_pronunciations(path: Path | None) -> None:
    """Read the file again. PronunciationsError, and the old words stay, if it cannot be used."""
    check_pronunciations(path)
    load_pronunciations.cache_clear()


def _find(text: str, tables: Sequence[Pronunciations]) -> Iterator[tuple[int, int, str]]:
    """Start, end and respelling of each word, in order."""
    tokens = _tokens(text)
    first = 0
    while first < len(tokens):
        words = (table.find(tokens, first, text) for table in tables)
        behind, respelling = next((word for word in words if word is not None), (first + 1, None))
        if respelling is not None:
            yield tokens[first][0], tokens[behind - 1][1], respelling
        first = behind


def _tokens(text: str) -> list[_Token]:
    return [
        (match.start(), match.end(), " " if match[0].isspace() else match[0].casefold())
        for match in _TOKEN.finditer(text)
    ]


def _goes_on(text: str, end: int) -> bool:
    """True if the word before `end` goes on with an accent of its last letter."""
    return end < len(text) and unicodedata.category(text[end]).startswith("M")
