"""Speech whose text is still being written: an utterance takes text piece by piece, and speaks it.

A route gives text and takes what was spoken; it knows the client's dialect, this module knows none.
"""

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal

from server.engine import Chunk, Speech
from server.http.errors import ApiError
from server.routes.speech_response import abort_on_failure, finished_of
from server.routes.speech_start import SpeechPlan, StartedSpeech
from server.text import GrowingText, Pause, SentenceSplitter, is_ssml, may_become_ssml
from shared.pcm import silence
from shared.protocol import Finished
from shared.text import MAX_RESPELLED, is_speakable

SplitGranularity = Literal["none", "sentence", "clause"]

MAX_WAITING: Final = 256
"""Utterances of one queue that wait while another one is spoken."""


@dataclass(frozen=True)
class PartStart:
    """The engine has the next part of the utterance; its chunks follow. `text` is what is known of it so far."""

    text: str
    started: StartedSpeech


@dataclass(frozen=True)
class PartEnd:
    """All chunks of the part have come."""

    finished: Finished


SpeechEvent = PartStart | Chunk | PartEnd


class _Part:
    """A request to the engine. An open one has begun before its text is complete."""

    def __init__(self, text: str = "", *, is_open: bool, pause_ms: int = 0) -> None:
        self.text = text
        self.is_open = is_open
        self.ended = not is_open
        self.pause_ms = pause_ms
        """The silence behind an open part."""
        self.speech: Speech | None = None

    @property
    def can_start(self) -> bool:
        return self.ended or is_speakable(self.text)

    def append(self, text: str) -> None:
        self.text += text
        if self.speech is not None:
            self.speech.append(text)

    def end(self, pause_ms: int = 0) -> None:
        self.ended = True
        self.pause_ms = pause_ms
        if self.speech is not None:
            self.speech.end_text()

    async def start(self, plan: SpeechPlan, request_id: str) -> StartedSpeech:
        if not self.is_open:
            return await plan.start(self.text, request_id)
        if self.ended and not is_speakable(self.text):
            pause_ms, self.pause_ms = self.pause_ms, 0
            return await plan.start(f"[pause:{pause_ms}ms]", request_id)
        started = plan.start_open(self.text, request_id)
        self.speech = started.speech
        if self.ended:
            self.speech.end_text()
        return started


class Utterance:
    """A text in pieces, and its speech. With a `split`, each sentence or clause is a part of its own.

    Without one, the engine gets each piece when it comes, and a pause mark begins another part.
    Markdown, SSML and Qwen3-TTS's layout of whole texts need all of the text first.
    """

    def __init__(self, plan: SpeechPlan, request_id: str, split: SplitGranularity = "none") -> None:
        self.plan = plan
        self.ended = False
        """True if its text is complete."""
        self._request_id = request_id
        self._splitter = SentenceSplitter(split) if split != "none" else None
        self._growing = GrowingText(plan.pronunciations())
        self._kind: Literal["undecided", "whole", "split", "growing"] = "undecided"
        self._beginning = ""
        """The text while it is undecided how it is spoken; all of it if it is spoken as a whole."""
        self.length = 0
        """Characters of its text so far."""
        self._respelled_length = 0
        self._parts: deque[_Part] = deque()
        self._last: _Part | None = None
        """The open part, if its text goes on."""
        self._news = asyncio.Event()

    def append(self, text: str) -> None:
        """Take more text. Raises ApiError: it has become too long, or no text can have such a character or pause."""
        with _about_text():
            self._append(text)

    def _append(self, text: str) -> None:
        limit = self.plan.starter.settings.max_input_chars
        self.length += len(text)
        if self.length > limit:
            message = f"text: an utterance has at most {limit} characters (TTS_MAX_INPUT_CHARS)."
            raise ApiError("invalid_value", message, param="text")
        if "\0" in text:
            raise ApiError("invalid_value", "text: contains a null character.", param="text")
        if self._kind == "undecided":
            text = self._beginning = self._beginning + text
            self._kind = self._kind_of(text)
        elif self._kind == "whole":
            self._beginning += text
        self._take(text)

    def end(self) -> None:
        """Its text is complete. Raises ApiError: what was held back of it is too long."""
        with _about_text():
            self._end()

    def _end(self) -> None:
        if self._kind == "undecided" and self._beginning.strip():
            self._kind = "split" if self._splitter else "growing"
            self._take(self._beginning)
        if self._kind == "whole":
            self._parts.append(_Part(self._beginning, is_open=False))
        elif self._kind == "split" and self._splitter and (rest := self._splitter.rest()):
            self._parts.append(_Part(rest, is_open=False))
        elif self._kind == "growing":
            self._grow(self._growing.rest())
            self._end_part()
        self.ended = True
        self._news.set()

    async def speak(self) -> AsyncGenerator[SpeechEvent]:
        """Yield the speech while it is made. Raises ApiError. Close the iterator to stop the speech at once."""
        number = 0
        while (part := await self._next_part()) is not None:
            with _about_text():
                started = await part.start(self.plan, f"{self._request_id}-{number}")
            number += 1
            with _about_text(), abort_on_failure(started.speech):
                yield PartStart(part.text, started)
                while (chunk := await started.speech.chunk()) is not None:
                    yield chunk
                for pcm in silence(part.pause_ms / 1000):
                    yield Chunk(pcm, None)
                yield PartEnd(finished_of(started.speech))

    def _kind_of(self, text: str) -> Literal["undecided", "whole", "split", "growing"]:
        form = self.plan.input_format
        if form == "ssml" or (form == "auto" and is_ssml(text)):
            return "whole"
        if not text.strip() or (form == "auto" and may_become_ssml(text)):
            return "undecided"
        if self._splitter:
            return "split"
        return "whole" if form == "markdown" or self.plan.data.non_streaming_mode else "growing"

    def _take(self, text: str) -> None:
        if self._kind == "split" and self._splitter:
            self._parts.extend(_Part(sentence, is_open=False) for sentence in self._splitter.feed(text))
        elif self._kind == "growing":
            self._grow(self._growing.feed(text))
        self._news.set()

    def _grow(self, items: list[str | Pause]) -> None:
        self._respelled_length += sum(len(item) for item in items if isinstance(item, str))
        limit = MAX_RESPELLED * self.plan.starter.settings.max_input_chars
        if self._respelled_length > limit:
            message = f"text: with its pronunciations it has more than {limit} characters."
            raise ApiError("invalid_value", message, param="text")
        for item in items:
            if isinstance(item, Pause):
                self._end_part(item.ms)
            elif self._last is not None:
                self._last.append(item)
            else:
                self._last = _Part(item, is_open=True)
                self._parts.append(self._last)

    def _end_part(self, pause_ms: int = 0) -> None:
        if self._last is None and pause_ms:
            self._last = _Part(is_open=True)
            self._parts.append(self._last)
        if self._last is not None:
            self._last.end(pause_ms)
            self._last = None

    async def _next_part(self) -> _Part | None:
        while True:
            if self._parts and self._parts[0].can_start:
                part = self._parts.popleft()
                if part.text.strip() or part.pause_ms:
                    return part
            elif self.ended:
                return None
            else:
                self._news.clear()
                await self._news.wait()


@contextmanager
def _about_text() -> Iterator[None]:
    """Name the input `text` in an ApiError of the block: so every message calls it that has a piece of it."""
    try:
        yield
    except ApiError as error:
        if error.param == "input":
            error.param = "text"
            error.message = re.sub(r"\Ainput\b", "text", error.message)
        raise


class UtteranceQueue:
    """Speaks utterances one after the other, in a task of its own while there are any.

    `speak` speaks one of them to its end. If it raises an error, `fail` gets that error and the queue is empty.
    `on_empty` is called when no utterance is left. `refusal` gives the error for one too many.
    """

    def __init__(
        self,
        speak: Callable[[Utterance], Awaitable[None]],
        fail: Callable[[Exception], None],
        on_empty: Callable[[], None],
        refusal: Callable[[str], ApiError],
    ) -> None:
        self._speak = speak
        self._fail = fail
        self._on_empty = on_empty
        self._refusal = refusal
        self._waiting: deque[Utterance] = deque()
        self._current: Utterance | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def characters(self) -> int:
        """The length of the texts that it holds."""
        current = [] if self._current is None else [self._current]
        return sum(utterance.length for utterance in (*current, *self._waiting))

    @property
    def running(self) -> bool:
        """True while there is an utterance, complete or not."""
        return self._current is not None or bool(self._waiting)

    @property
    def busy(self) -> bool:
        """True while something is to be said whose text is complete."""
        current = self._current is not None and self._current.ended
        return current or any(utterance.ended for utterance in self._waiting)

    def add(self, utterance: Utterance) -> None:
        """Speak `utterance` after those before it. Raises ApiError (`queue_full`)."""
        if len(self._waiting) >= MAX_WAITING:
            raise self._refusal(f"{MAX_WAITING} utterances wait to be spoken, as many as one socket may have.")
        self._waiting.append(utterance)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def cancel(self) -> None:
        """Stop at once, and forget what waits."""
        self._waiting.clear()
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while self._waiting:
                self._current = self._waiting.popleft()
                await self._speak(self._current)
        except Exception as error:  # noqa: BLE001 - the socket ends with it
            self._waiting.clear()
            self._fail(error)
        finally:
            self._current = None
        self._task = None
        self._on_empty()
