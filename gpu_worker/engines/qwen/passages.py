"""The passages of a job: the texts of its utterances with their rates, and the pauses between them.

Owns the text of an open job that has not been taken yet. It knows neither tensors nor slots.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.engines.qwen.incremental_splitting import IncrementalSplitter, SingleUtteranceSplitter
from gpu_worker.engines.qwen.text_splitting import clean_text, remove_controls
from shared.pcm import bytes_for
from shared.protocol import Segment
from shared.text import is_speakable

_CONTROL_TOKEN_BEGUN: Final = re.compile(r"<(\|[^<>|]*\|?|t|tt|tts|tts_[a-z_]*)?\Z")
"""The beginning of a CONTROL_TOKEN at the end of a text."""

Split = Callable[[str], Iterable[str]]
"""A clean text -> its utterances."""


class Passage(msgspec.Struct, frozen=True):
    """The text of an utterance, its rate, and the pause before it in bytes of PCM.

    An empty `text` ends the job; its pause is the last sound.
    `incomplete`: of an open job, `text` is the beginning alone.
    """

    text: str
    rate: float = 1.0
    pause_bytes: int = 0
    incomplete: bool = False


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
                return Passage("", pause_bytes=self._pause_bytes)
            segment = self._segments.pop(0)
            text = clean_text(segment.text)
            self._utterances = iter(self._split(text) if text else ())
            self._rate, self._pause_behind = segment.rate, bytes_for(segment.pause_ms / 1000)


class Tokens(Protocol):
    """The tokens of texts, by a checkpoint's tokenizer."""

    def ids(self, text: str) -> Sequence[int]:
        """The tokens of a text."""

    def count(self, text: str) -> int:
        """How many they are."""

    def settled(self, text: str) -> Sequence[int]:
        """The first tokens of every text that begins with `text`."""


class OpenText(Iterator[Passage | None]):
    """The passages of a text that is being written: those of the whole text. None: more text has to come first.

    A passage may come before its text is complete. `ids` are the tokens of the passage that are sure so far, and
    `complete` tells whether these are all; `read_on` looks for more. The next passage comes behind a complete one.
    Where the text cannot be spoken, nothing comes any more, and `error` says why.
    """

    def __init__(
        self,
        segments: list[Segment],
        tokens: Tokens,
        *,
        language: str,
        limit: int,
        too_long: Callable[[str], JobError] | None,
        in_parts: JobError,
    ) -> None:
        """`limit`: the most tokens of an utterance.

        With `too_long`, all text must be one utterance: a longer one is that error, and a second segment is `in_parts`.
        """
        self._tokens = tokens
        self._language = language
        self._limit = limit
        self._too_long = too_long
        self._in_parts = in_parts
        segments = segments or [Segment(text="")]
        self._segments = deque(_OpenSegment(segment, self._new_splitter()) for segment in segments)
        for segment in list(self._segments)[:-1]:
            segment.closed = True
        self._ended = False
        self._pause_bytes = 0
        self._segments_begun = 0
        self.min_ids = 1
        """How many tokens an incomplete passage must have to begin."""

        self.ids: Sequence[int] = ()
        self.complete = True
        self.error: JobError | None = None

    def append(self, text: str, *, flush: bool) -> None:
        """Add text to the last segment. With `flush` the segment ends behind it."""
        if self._ended:
            return
        last = self._segments[-1]
        last.append(text)
        if flush:
            last.closed = True
            self._segments.append(_OpenSegment(Segment(text="", rate=last.rate), self._new_splitter()))

    def end(self) -> None:
        """The text is complete."""
        self._segments[-1].closed = True
        self._ended = True

    def __next__(self) -> Passage | None:
        self.read_on()
        while self.complete and self.error is None:
            segment = self._segments[0]
            utterance = self._next_utterance(segment)
            if utterance is not None:
                return self._begin(segment, utterance, self._tokens.ids(utterance), complete=True)
            beginning = segment.splitter.beginning()
            ids = self._tokens.settled(beginning) if beginning else ()
            if len(ids) >= self.min_ids and not segment.closed:
                return self._begin(segment, beginning, ids, complete=False)
            if not segment.closed:
                return None
            if len(self._segments) == 1:
                return Passage("", pause_bytes=self._pause_bytes + segment.pause_bytes)
            self._pause_bytes += segment.pause_bytes
            self._segments.popleft()
        return None

    def read_on(self) -> None:
        """Look for more of the current passage."""
        segment = self._segments[0]
        if self.complete or not segment.has_news:
            return
        utterance = self._next_utterance(segment)
        if utterance is not None:
            self.ids, self.complete = self._tokens.ids(utterance), True
        else:
            ids = self._tokens.settled(segment.splitter.beginning())
            self.ids = ids if len(ids) > len(self.ids) else self.ids
        self._check(segment, self.ids)

    def _begin(self, segment: "_OpenSegment", text: str, ids: Sequence[int], *, complete: bool) -> Passage | None:
        if not segment.begun:
            segment.begun = True
            self._segments_begun += 1
        if not self._check(segment, ids):
            return None
        self.ids, self.complete = ids, complete
        pause_bytes, self._pause_bytes = self._pause_bytes, 0
        return Passage(text, segment.rate, pause_bytes, incomplete=not complete)

    def _check(self, segment: "_OpenSegment", ids: Sequence[int]) -> bool:
        if self._too_long is not None and self._segments_begun > 1:
            self.error = self._in_parts
        elif self._too_long is not None and len(ids) > self._limit:
            self.error = self._too_long(segment.clean_text)
        return self.error is None

    def _next_utterance(self, segment: "_OpenSegment") -> str | None:
        segment.update()
        return segment.splitter.next_utterance() if segment.clean_text else None

    def _new_splitter(self) -> IncrementalSplitter | SingleUtteranceSplitter:
        if self._too_long is not None:
            return SingleUtteranceSplitter()
        return IncrementalSplitter(self._language, self._limit, self._tokens.count, self._tokens.settled)


class _OpenSegment:
    """A segment whose text may still grow. `clean_text` is what is sure of it, as of the last `update`."""

    def __init__(self, segment: Segment, splitter: IncrementalSplitter | SingleUtteranceSplitter) -> None:
        self.splitter = splitter
        self.rate = segment.rate
        self.pause_bytes = bytes_for(segment.pause_ms / 1000)
        self.clean_text = ""
        self.begun = False
        self._closed = False
        self._text = segment.text
        self.has_news = True

    @property
    def closed(self) -> bool:
        """True if no more text comes."""
        return self._closed

    @closed.setter
    def closed(self, closed: bool) -> None:
        self._closed = closed
        self.has_news = True

    def append(self, text: str) -> None:
        """Add text."""
        self._text += text
        self.has_news = True

    def update(self) -> None:
        """Clean what came, but for the end that may be the beginning of a control token."""
        if not self.has_news:
            return
        self.has_news = False
        if self._closed:
            self.clean_text = clean_text(self._text)
        else:
            text = remove_controls(_CONTROL_TOKEN_BEGUN.sub("", self._text)).lstrip()
            self.clean_text = text if is_speakable(text) else ""
        if self.clean_text:
            self.splitter.update(self.clean_text, closed=self._closed)
