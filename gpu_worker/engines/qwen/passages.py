"""The passages of a job: the texts of its utterances with their rates, and the pauses between them.

Owns the text of an open job that has not been taken yet. It knows neither tensors nor slots.
"""

from collections.abc import Callable, Iterable, Iterator

import msgspec

from gpu_worker.engines.qwen.text_splitting import clean_text
from shared.pcm import bytes_for
from shared.protocol import Segment

Split = Callable[[str], Iterable[str]]
"""A clean text -> its utterances."""


class Passage(msgspec.Struct, frozen=True):
    """The text of an utterance, its rate, and the pause before it in bytes of PCM.

    An empty `text` ends the job; its pause is the last sound.
    """

    text: str
    rate: float = 1.0
    pause_bytes: int = 0


class WholeText(Iterator[Passage | None]):
    """The passages of a whole text. Each is cut off when it is asked for; behind the last one comes an empty one."""

    def __init__(self, segments: list[Segment], split: Split) -> None:
        self._split = split
        self._segments = list(segments)
        self._utterances: Iterator[str] = iter(())
        self._rate = 1.0
        self._pause_bytes = self._pause_behind = 0

    def __next__(self) -> Passage | None:
        while True:
            utterance = next(self._utterances, None)
            if utterance is not None:
                pause_bytes, self._pause_bytes = self._pause_bytes, 0
                return Passage(utterance, self._rate, pause_bytes)
            self._pause_bytes += self._pause_behind
            self._pause_behind = 0
            if not self._segments:
                return self._end()
            segment = self._segments.pop(0)
            text = clean_text(segment.text)
            self._utterances = iter(self._split(text) if text else ())
            self._rate, self._pause_behind = segment.rate, bytes_for(segment.pause_ms / 1000)

    def _end(self) -> Passage | None:
        return Passage("", pause_bytes=self._pause_bytes)


class OpenText(WholeText):
    """The passages of a text that is being written. None: more text has to come first.

    A passage comes when its segment has ended.
    """

    def __init__(self, segments: list[Segment], split: Split) -> None:
        super().__init__(segments[:-1], split)
        self._last = segments[-1] if segments else Segment(text="")
        self._ended = False

    def append(self, text: str, *, flush: bool) -> None:
        """Add text to the last segment. With `flush` the segment ends behind it."""
        if self._ended:
            return
        self._last = msgspec.structs.replace(self._last, text=self._last.text + text)
        if flush:
            self._segments.append(self._last)
            self._last = Segment(text="", rate=self._last.rate)

    def end(self) -> None:
        """The text is complete."""
        if not self._ended:
            self._segments.append(self._last)
            self._ended = True

    def _end(self) -> Passage | None:
        return super()._end() if self._ended else None
