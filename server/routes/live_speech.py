"""Speech whose text is still being written: an utterance takes text piece by piece, and speaks it.

A route gives text and takes what was spoken; it knows the client's dialect, this module knows none.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Literal

from server.engine import Chunk
from server.http.errors import ApiError
from server.routes.speech_response import failure_of, finished_of
from server.routes.speech_start import SpeechPlan, StartedSpeech
from server.text import SentenceSplitter
from shared.protocol import Finished

Split = Literal["none", "sentence", "clause"]

MAX_WAITING: Final = 256
"""Utterances of one queue that wait while another one is spoken."""


@dataclass(frozen=True)
class SentenceStart:
    """The engine has the next part of the utterance; its chunks follow. `text` is what is known of it so far."""

    text: str
    started: StartedSpeech


@dataclass(frozen=True)
class SentenceEnd:
    """All chunks of the part have come."""

    finished: Finished


Spoken = SentenceStart | Chunk | SentenceEnd


class Utterance:
    """A text in pieces, and its speech. With `split`, each sentence or clause is a request of its own."""

    def __init__(self, plan: SpeechPlan, request_id: str, split: Split = "none") -> None:
        self.plan = plan
        self.ended = False
        """True if its text is complete."""
        self._request_id = request_id
        self._splitter = SentenceSplitter(split) if split != "none" else None
        self._length = 0
        self._sentences: deque[str] = deque()
        self._news = asyncio.Event()

    def append(self, text: str) -> None:
        """Take more text. Raises ApiError: it has become too long, or no text can have such a character."""
        limit = self.plan.starter.settings.max_input_chars
        self._length += len(text)
        if self._length > limit:
            raise ApiError("invalid_value", f"text: an utterance has at most {limit} characters.", param="text")
        if "\0" in text:
            raise ApiError("invalid_value", "text: contains a null character.", param="text")
        if text:
            self._sentences.extend(self._splitter.feed(text) if self._splitter else [text])
            self._news.set()

    def end(self) -> None:
        """Its text is complete."""
        if self._splitter and (rest := self._splitter.rest()):
            self._sentences.append(rest)
        self.ended = True
        self._news.set()

    async def speak(self) -> AsyncGenerator[Spoken]:
        """What is spoken, while it is made. Raises ApiError. Close the iterator to stop the speech at once."""
        number = 0
        async for text in self._texts():
            started = await self.plan.start(text, f"{self._request_id}-{number}")
            number += 1
            try:
                yield SentenceStart(text, started)
                while (chunk := await started.speech.chunk()) is not None:
                    yield chunk
                yield SentenceEnd(finished_of(started.speech))
            except BaseException as error:
                started.speech.abort(failure_of(error))
                raise

    async def _texts(self) -> AsyncGenerator[str]:
        """The texts of the requests."""
        while self._splitter and not (self.ended and not self._sentences):
            if self._sentences:
                yield self._sentences.popleft()
            else:
                await self._wait()
        while not self.ended:
            await self._wait()
        if whole := "".join(self._sentences).strip():
            yield whole

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class UtteranceQueue:
    """Speaks utterances one after the other, in a task of its own while there are any.

    `speak` speaks one of them to its end; `fail` gets the error if it raises one, and the queue is empty then.
    """

    def __init__(
        self, speak: Callable[[Utterance], Awaitable[None]], fail: Callable[[Exception], None], idle: Callable[[], None]
    ) -> None:
        self._speak = speak
        self._fail = fail
        self._idle = idle
        self._waiting: deque[Utterance] = deque()
        self._current: Utterance | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """True while something is to be said whose text is complete."""
        current = self._current is not None and self._current.ended
        return current or any(utterance.ended for utterance in self._waiting)

    def add(self, utterance: Utterance) -> None:
        """Speak `utterance` after those before it. Raises ApiError (`queue_full`)."""
        if len(self._waiting) >= MAX_WAITING:
            message = f"{MAX_WAITING} utterances wait to be spoken, as many as one socket may have."
            raise ApiError("queue_full", message)
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
        self._idle()
