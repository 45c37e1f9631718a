"""Words with their times as a listener hears them, and as they stand in the input."""

import pytest

from server.captions import Captions
from server.engine import Chunk
from server.text import PreparedSegment, prepare
from server.text.spans import Span, copied
from shared.pcm import bytes_for
from shared.protocol import Word


def chunk(seconds: float, *words: Word, rate: float | None = 1.0) -> Chunk:
    """Some PCM."""
    return Chunk(bytes(bytes_for(seconds)), rate, list(words))


def shown(words: list[object]) -> list[tuple[str, float, float]]:
    """Words as tuples."""
    return [(word.word, word.start_time, word.end_time) for word in words]  # type: ignore[attr-defined]


def test_words_come_when_they_are_said() -> None:
    """A word is complete when its audio has come and another word follows; the rest comes at the end."""
    captions = Captions("one two three", prepare("one two three", "text", max_chars=99), 1.0)
    captions.feed(chunk(0.5, Word(0, 0, 3, 0.0, 0.4), Word(0, 4, 7, 0.4, 0.9), Word(0, 8, 13, 0.9, 1.5)))
    assert shown(captions.complete()) == [("one", 0.0, 0.4)]
    captions.feed(chunk(0.5))
    assert shown(captions.complete()) == [("two", 0.4, 0.9)]
    captions.feed(chunk(0.5))
    assert captions.complete() == []
    assert shown(captions.rest()) == [("three", 0.9, 1.5)]
    assert captions.rest() == []


@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_changes_speech_and_not_pauses(speed: float) -> None:
    """Behind a pause, words are as late as they are heard."""
    text = "one [pause:2s] two"
    captions = Captions(text, prepare(text, "text", max_chars=99), speed)
    captions.feed(chunk(1.0, Word(0, 0, 3, 0.0, 1.0)))
    captions.feed(chunk(2.0, rate=None))
    captions.feed(chunk(1.0, Word(1, 1, 4, 3.0, 4.0)))
    assert shown(captions.rest()) == [("one", 0.0, 1 / speed), ("two", 1 / speed + 2, 2 / speed + 2)]


def test_rates_of_segments() -> None:
    """A segment that is said at its own rate, within the limits of speed."""
    segments = [
        PreparedSegment([copied("one two", 0, 3, rate=1.0)], 0),
        PreparedSegment([copied("one two", 4, 7, rate=2.0)], 0),
    ]
    captions = Captions("one two", segments, 1.0)
    captions.feed(chunk(1.0, Word(0, 0, 3, 0.0, 1.0)))
    captions.feed(chunk(1.0, Word(1, 0, 3, 1.0, 2.0), rate=2.0))
    assert shown(captions.rest()) == [("one", 0.0, 1.0), ("two", 1.0, 1.5)]


def test_a_replaced_word_is_that_of_the_input() -> None:
    """Two words that are said for one of the input are one; marks of the source are not in the words."""
    text = "**Ask** SQL now"
    spans = [copied(text, 2, 5), Span(" ", 7, 8), Span("my sequel", 8, 11), copied(text, 11, 15)]
    captions = Captions(text, [PreparedSegment(spans, 0)], 1.0)
    said = "Ask my sequel now"
    words = [Word(0, said.index(w), said.index(w) + len(w), t, t + 0.5) for t, w in enumerate(said.split())]
    captions.feed(chunk(2.0, *words[:2]))
    assert shown(captions.complete()) == [("Ask", 0.0, 0.5)]
    captions.feed(chunk(2.0, *words[2:]))
    assert shown(captions.rest()) == [("SQL", 1.0, 2.5), ("now", 3.0, 3.5)]


def test_a_limit_cuts_words_off() -> None:
    """Times end with the audio; a word that is not said at all is left out."""
    captions = Captions("one two three", prepare("one two three", "text", max_chars=99), 1.0)
    captions.feed(chunk(0.5, Word(0, 0, 3, 0.0, 0.4), Word(0, 4, 7, 0.4, 0.9), Word(0, 8, 13, 0.9, 1.5)))
    assert shown(captions.rest()) == [("one", 0.0, 0.4), ("two", 0.4, 0.5)]


def test_words_that_come_late() -> None:
    """An aligner tells of words behind their audio."""
    captions = Captions("one two", prepare("one two", "text", max_chars=99), 2.0)
    captions.feed(chunk(1.0))
    captions.feed(chunk(1.0, Word(0, 0, 3, 0.2, 0.8), Word(0, 4, 7, 1.0, 1.8)))
    assert shown(captions.complete()) == [("one", 0.1, 0.4)]
    assert shown(captions.rest()) == [("two", 0.5, 0.9)]
