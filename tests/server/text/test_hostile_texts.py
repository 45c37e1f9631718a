"""Texts that are made to cost time: eight times as much of them costs about eight times as much."""

import contextlib
import time
from collections.abc import Callable

import pytest

from server.http.errors import ApiError
from server.text import InputFormat, Pronunciations, prepare

SHORT, LONG = 250, 2000
MANY_CHARS = 1_000_000
LINEAR_UP_TO = 24
"""Quadratic time would be 64 times as much. CPU time of this process alone is counted, the best of two runs."""

WORDS = Pronunciations({"a " * count + "b": "c" for count in range(1, 50)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("input_format", "text"),
    [
        ("markdown", lambda size: "[" * size),
        ("markdown", lambda size: "![" * (size // 2)),
        ("markdown", lambda size: "[](" * (size // 3)),
        ("markdown", lambda size: "[a](<" * (size // 5)),
        ("markdown", lambda size: "[" * (size // 2) + "]" * (size // 2)),
        ("markdown", lambda size: "*a_ " * (size // 4)),
        ("markdown", lambda size: "> " * (size // 2)),
        ("markdown", lambda size: "- " * (size // 2)),
        ("markdown", lambda size: "<!--" * (size // 4)),
        ("markdown", lambda size: "<think></think>a" * (size // 16)),
        ("markdown", lambda size: "|a" * (size // 4) + "\n" + "|-" * (size // 4)),
        ("markdown", lambda size: "".join("`" * (number % 60 + 1) + " " for number in range(size // 31))),
        ("ssml", lambda size: "<speak>" + "<b>" * size),
        ("ssml", lambda size: "<speak>" + "é&amp;" * (size // 6) + "</speak>"),
        ("ssml", lambda size: "<speak>" + "<sub alias='x'>a</sub>" * (size // 22) + "</speak>"),
        ("auto", lambda size: "\n" * size + "<speak"),
        ("text", lambda size: "[pause:" * (size // 7)),
        ("text", lambda size: "[pause:1ms]a" * (size // 12)),
        ("text", lambda size: "a " * (size // 2)),
    ],
)
def test_time_is_linear(input_format: InputFormat, text: Callable[[int], str]) -> None:
    """Nested marks, half-open marks and near misses of pronunciations."""
    short_s, long_s = (min(cpu_s(text(size), input_format) for _ in range(2)) for size in (SHORT, LONG))
    assert long_s < LINEAR_UP_TO * max(short_s, 0.0005)


@pytest.mark.soak
@pytest.mark.parametrize("text", ["a b c d ", "[pause:1ms]aa bb cc "])
def test_a_book_is_prepared_in_seconds(text: str) -> None:
    """Every word is replaced, or there is a pause at every word; quadratic time would be minutes of CPU time."""
    repeated = text * (MANY_CHARS // len(text))
    began = time.process_time()
    words = Pronunciations({"a": "x"})
    segments = prepare(repeated, "text", pronunciations=[words], max_chars=2 * MANY_CHARS)
    last = segments[-1]
    for index in range(len(last.text) - 1):
        last.source_range(index, index + 1)
    assert time.process_time() - began < 60


def cpu_s(text: str, input_format: InputFormat) -> float:
    """The CPU time of one preparation."""
    began = time.process_time()
    with contextlib.suppress(ApiError):
        prepare(text, input_format, pronunciations=[WORDS], max_chars=100_000)
    return time.process_time() - began
