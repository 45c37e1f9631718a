"""Spans: text to speak, piece by piece, each with the place in the source that it stands for.

A reader makes spans of a source, in its order. Later steps split and replace them, and never lose a place.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence

import msgspec


class Span(msgspec.Struct, frozen=True):
    """`text` is spoken for source[start:end].

    `copied`: it is that part of the source, character by character. Else it stands for that part as a whole;
    with start == end, it stands for nothing: a separator between two blocks.
    `rate`: how many times as fast as the rest to speak.
    """

    text: str
    start: int
    end: int
    copied: bool = False
    rate: float = 1.0

    def part(self, start: int, end: int) -> "Span":
        """The span of text[start:end]."""
        if not self.copied:
            return msgspec.structs.replace(self, text=self.text[start:end])
        return Span(self.text[start:end], self.start + start, self.start + end, copied=True, rate=self.rate)


class Pause(msgspec.Struct, frozen=True):
    """Silence between two spans."""

    ms: int


def copied(source: str, start: int, end: int, rate: float = 1.0) -> Span:
    """The span that speaks source[start:end] as it is."""
    return Span(source[start:end], start, end, copied=True, rate=rate)


def text_of(spans: Iterable[Span]) -> str:
    """The text of all `spans`."""
    return "".join(span.text for span in spans)


def split(spans: Iterable[Span], borders: Iterable[int]) -> Iterator[list[Span]]:
    """Cut `spans` at ascending offsets into their text: one more list than there are `borders`, some of them empty."""
    waiting = iter(spans)
    span = next(waiting, None)
    position = 0  # of the beginning of `span`
    taken = 0  # the characters of `span` that were cut off already
    for border in borders:
        piece = []
        while span is not None and position + len(span.text) <= border:
            piece.append(span.part(taken, len(span.text)) if taken else span)
            position += len(span.text)
            span, taken = next(waiting, None), 0
        if span is not None and position + taken < border:
            piece.append(span.part(taken, border - position))
            taken = border - position
        yield piece
    yield [] if span is None else [span.part(taken, len(span.text)) if taken else span, *waiting]


def begins_of(spans: Iterable[Span]) -> list[int]:
    """The place where each span begins in the text of all, and the length of that text."""
    return [0, *itertools.accumulate(len(span.text) for span in spans)]


def source_range(
    spans: Sequence[Span], start: int, end: int, *, begins: Sequence[int] | None = None
) -> tuple[int, int]:
    """The part of the source for which characters `start` to `end` (above `start`) of the text of `spans` stand.

    `begins`: what `begins_of` says of the spans, for many calls.
    """
    begins = begins_of(spans) if begins is None else begins
    first = bisect.bisect_right(begins, start) - 1
    last = bisect.bisect_left(begins, end) - 1
    head = spans[first].part(start - begins[first], len(spans[first].text))
    tail = spans[last].part(0, end - begins[last])
    return head.start, tail.end
