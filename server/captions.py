"""Words with their times, as a listener hears them: the GPU worker's words, found again in the input.

The worker counts in the PCM that it sends. Speed and the rates of segments change the duration of speech,
and leave that of pauses.
"""

from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from server.audio import effective_speed
from server.engine import Chunk
from server.schemas import TimedWord
from server.text import PreparedSegment
from shared.pcm import bytes_for

_BYTES_PER_S = bytes_for(1.0)


class _Placed(msgspec.Struct):
    """input[start:end], said from `start_s` to `end_s` of the PCM."""

    start: int
    end: int
    start_s: float
    end_s: float


class Captions:
    """The words of one speech: `feed` it every chunk; take the words that are complete, and at the end the rest.

    A word that replaces another one in the input is that one, however many words were said for it.
    """

    def __init__(self, text: str, segments: Sequence[PreparedSegment], speed: float) -> None:
        self._text = text
        self._segments = segments
        self._speed = speed
        self._words: list[_Placed] = []
        self._pcm_s = 0.0
        self._audio_s = 0.0
        # Where the speed changes: the PCM's second, the audio's, and the speed from there on.
        self._changes: list[tuple[float, float, float]] = []

    def feed(self, chunk: Chunk) -> None:
        """Take the words of `chunk`, and its place in time."""
        speed = effective_speed(self._speed, chunk.rate)
        if not self._changes or self._changes[-1][2] != speed:
            self._changes.append((self._pcm_s, self._audio_s, speed))
        seconds = len(chunk.pcm) / _BYTES_PER_S
        self._pcm_s += seconds
        self._audio_s += seconds / speed
        for word in chunk.words:
            start, end = self._segments[word.segment].source_range(word.start, word.end)
            if self._words and (self._words[-1].start, self._words[-1].end) == (start, end):
                self._words[-1].end_s = word.end_s
            else:
                self._words.append(_Placed(start, end, word.start_s, word.end_s))

    def complete(self) -> list[TimedWord]:
        """The next words that are said in full. The last one waits: another may be said for the same word."""
        count = 0
        while count < len(self._words) - 1 and self._words[count].end_s <= self._pcm_s:
            count += 1
        return self._take(count)

    def rest(self) -> list[TimedWord]:
        """All other words of a speech whose chunks have all come; a limit may have cut off the last of them."""
        return [word for word in self._take(len(self._words)) if word.start_time < word.end_time]

    def _take(self, count: int) -> list[TimedWord]:
        taken, self._words = self._words[:count], self._words[count:]
        return [
            TimedWord(
                word=self._text[word.start : word.end],
                start_time=self._heard_at(word.start_s),
                end_time=self._heard_at(word.end_s),
            )
            for word in taken
        ]

    def _heard_at(self, pcm_s: float) -> float:
        """The audio's second in which a second of the PCM is heard."""
        pcm_s = min(pcm_s, self._pcm_s)
        begun = bisect_right(self._changes, (pcm_s, float("inf"), 0.0)) - 1
        since_s, heard_s, speed = self._changes[max(begun, 0)]
        return round(heard_s + (pcm_s - since_s) / speed, 3)
