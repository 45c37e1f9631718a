"""`prepare` turns an input into segments: what is spoken in one go, and the pause behind it.

A reader makes spans and pauses of the input. Here pause marks are found, and what cannot be spoken is left out.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from server.http.errors import ApiError
from server.text import pauses
from server.text.markdown import read_markdown
from server.text.pronunciations import Pronunciations, respell
from server.text.spans import Pause, Span, begins_of, copied, source_range, split, text_of
from server.text.ssml import is_ssml, read_ssml
from shared.composition import compose, compose_letter, is_composed, letters
from shared.protocol import Segment
from shared.text import is_speakable

InputFormat = Literal["auto", "text", "markdown", "ssml"]
"""auto: SSML if the text begins as SSML does, else plain text."""


class PreparedSegment(msgspec.Struct, frozen=True, dict=True):
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
        return source_range(self.spans, start, end, begins=self._begins)

    @functools.cached_property
    def _begins(self) -> list[int]:
        return begins_of(self.spans)

    def to_struct(self) -> Segment:
        """The segment as the GPU worker gets it."""
        return Segment(text=self.text, pause_ms=self.pause_ms, rate=self.spans[0].rate if self.spans else 1.0)


def prepare(
    text: str, input_format: InputFormat, *, pronunciations: Sequence[Pronunciations] = (), max_chars: int
) -> list[PreparedSegment]:
    """The segments of an input, in order. Without anything speakable, one segment has the sum of its pauses.

    Of the tables of `pronunciations` an earlier one counts before a later one.
    `max_chars` limits the text to speak: pronunciations may make it longer than the input.
    Raises ApiError (`invalid_value`): SSML is broken, or the text or its pauses are too long.
    """
    items = _pauses(_composed(_read(text, input_format)))
    segments = list(_segments(_respelled(items, pronunciations) if pronunciations else items))
    length = sum(len(segment.text) for segment in segments)
    if length > max_chars:
        message = f"input: with its pronunciations it has {length} characters, more than {max_chars}."
        raise ApiError("invalid_value", message, param="input")
    return segments


def _read(text: str, input_format: InputFormat) -> Sequence[Span | Pause]:
    match input_format:
        case "markdown":
            return read_markdown(text)
        case "ssml":
            return read_ssml(text)
        case "auto" if is_ssml(text):
            return read_ssml(text)
        case _:
            return [copied(text, 0, len(text))]


def _composed(items: Iterable[Span | Pause]) -> Iterator[Span | Pause]:
    """Compose letters. A new span stands for a whole letter; all else keeps its places."""
    for item in items:
        if isinstance(item, Pause) or is_composed(item.text):
            yield item
        elif not item.copied:
            yield msgspec.structs.replace(item, text=compose(item.text))
        else:
            kept = 0
            for start, end in letters(item.text):
                letter = item.text[start:end]
                if (one := compose_letter(letter)) != letter:
                    if start > kept:
                        yield item.part(kept, start)
                    yield Span(one, item.start + start, item.start + end, rate=item.rate)
                    kept = end
            if kept < len(item.text):
                yield item.part(kept, len(item.text))


def _respelled(items: Iterable[Span | Pause], pronunciations: Sequence[Pronunciations]) -> Iterator[Span | Pause]:
    """Replace words that have a pronunciation; a word stands within one segment."""
    for key, group in itertools.groupby(items, lambda item: None if isinstance(item, Pause) else item.rate):
        if key is None:
            yield from group
        else:
            yield from respell([item for item in group if isinstance(item, Span)], pronunciations)


def _pauses(items: Iterable[Span | Pause]) -> Iterator[Span | Pause]:
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
    """Group `items` by pauses and rates. One without letter or digit is left out; its pause goes to the one before.

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
