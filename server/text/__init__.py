"""The meaning of a client's text: the words to speak, the pauses, and the place of each character in the input.

Pure functions: no I/O, no model and no audio. Outsiders import the names below, never a module of the package.
"""

from server.text.growing import GrowingText
from server.text.preparation import InputFormat, PreparedSegment, prepare
from server.text.pronunciations import (
    EVERY_LANGUAGE,
    Pronunciations,
    PronunciationsError,
    Respelling,
    Word,
    check_pronunciations,
    load_pronunciations,
    reload_pronunciations,
)
from server.text.sentences import Granularity, SentenceSplitter, end_of_last_sentence
from server.text.spans import Pause
from server.text.ssml import is_ssml, may_become_ssml

__all__ = [
    "EVERY_LANGUAGE",
    "Granularity",
    "GrowingText",
    "InputFormat",
    "Pause",
    "PreparedSegment",
    "Pronunciations",
    "PronunciationsError",
    "Respelling",
    "SentenceSplitter",
    "Word",
    "check_pronunciations",
    "end_of_last_sentence",
    "is_ssml",
    "load_pronunciations",
    "may_become_ssml",
    "prepare",
    "reload_pronunciations",
]
