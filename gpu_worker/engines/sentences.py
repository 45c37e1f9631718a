"""The sentences of a text, by the library sentencex. Only this module calls it, because it must not fail.

sentencex is written in Rust. Where it panics, it raises an error that is no Exception, which would end the process.
"""

import itertools
import re
from typing import Final

import sentencex
import structlog

_WIDE_SPACE: Final = re.compile(r"[^\S\x00-\x7f]")
"""White space beyond ASCII, such as a no-break space. sentencex 1.0.32 panics at one between a letter and a stop."""

_PANIC: Final = "PanicException"
"""The name of Rust's error, which has no module to import it from."""

log = structlog.get_logger(__name__)


def sentences_of(text: str, language: str) -> list[str]:
    """The sentences, with the white space behind them. `language` is sentencex's code."""
    try:
        found = sentencex.segment(language, _WIDE_SPACE.sub(" ", text))
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        log.error("sentences_not_found", language=language)  # noqa: TRY400 -- its message may have the text
        return [text]
    places = [0, *itertools.accumulate(map(len, found))]
    return [text[start:end] for start, end in itertools.pairwise(places)]
