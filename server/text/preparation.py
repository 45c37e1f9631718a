"""`prepare` turns an input into segments: what is spoken in one go, and the pause behind it.

A reader makes spans and pauses of the input. Here pause marks are found, and what cannot be spoken is left out.
"""

import itertools
from collections.abc import Iterable, Iterator

import msgspec

from server.text import pauses
from server.text.spans import Pause, Span, copied, source_range, split, text_of
from shared.protocol import Segment
from shared.text import is_speakable


class PreparedSegment(msgspec.Struct, frozen=True):
    """A part of an input that is spoken in one go, and the silence behind it.

    The first segment may have no text: its pause comes before the first word. Every other one is speakable.
    """

    spans: list[Span]
    pause_ms: int

    @property
    def text(self) -> str:
        """The text to speak."""
        return text_of(self.spans)

    def source_range(self, start: int, end: int) -> tuple[int, int]:
        """The part of the input, as offsets of characters, that text[start:end] (not empty) stands for.

        A replaced word stands for all of the word in the input, whichever part of it is asked for.
        """
        return source_range(self.spans, start, end)

    def to_struct(self) -> Segment:
        """The segment as the GPU worker gets it."""
        return Segment(text=self.text, pause_ms=self.pause_ms, rate=self.spans[0].rate if self.spans else 1.0)


def prepare(text: str) -> list[PreparedSegment]:
    """The segments of an input, in order. Without anything speakable, one segment has the sum of its pauses.

    Raises ApiError (`invalid_value`) if a pause is too long, or all of them together.
    """
    return list(_segments(_read_pauses([copied(text, 0, len(text))])))


def _read_pauses(items: Iterable[Span | Pause]) -> Iterator[Span | Pause]:
    """Turn the pause marks in the text of `items` into pauses."""
    for is_pause, group in itertools.groupby(items, lambda item: isinstance(item, Pause)):
        if is_pause:
            yield from group
            continue
        spans = [item for item in group if isinstance(item, Span)]
        marks = list(pauses.marks(text_of(spans)))
        borders = [border for start, end, _ in marks for border in (start, end)]
        lengths = iter(marks)
        for number, piece in enumerate(split(spans, borders)):
            if number % 2:
                yield Pause(next(lengths)[2])
            else:
                yield from piece


def _segments(items: Iterable[Span | Pause]) -> Iterator[PreparedSegment]:
    """Group `items` by pauses and rates. What has no letter or digit is left out, and its pause goes to the one before.

    A pause of 0 ms separates nothing.
    """
    spans: list[Span] = []
    pause_ms = total_ms = 0
    for key, group in itertools.groupby(
        (item for item in items if item != Pause(0)),
        lambda item: None if isinstance(item, Pause) else item.rate,
    ):
        if key is None:
            added = sum(item.ms for item in group if isinstance(item, Pause))
            pause_ms, total_ms = pause_ms + added, total_ms + added
            pauses.check_sum(total_ms)
            continue
        new = [item for item in group if isinstance(item, Span)]
        if is_speakable(text_of(new)):
            if spans or pause_ms:
                yield PreparedSegment(spans, pause_ms)
            spans, pause_ms = new, 0
    yield PreparedSegment(spans, pause_ms)
