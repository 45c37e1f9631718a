"""The engine as routes use it: `EngineClient`, and `Speech`, one request while the GPU worker speaks it.

This module knows neither HTTP nor sockets. The package zmq beside it implements the protocol over ZeroMQ, the package
ray over the replicas of a cluster.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec

from server.engine.reports import ReplicaReport
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.pcm import EMPTY_S, silence
from shared.protocol import (
    SHARED_VOICES,
    Action,
    Append,
    Audio,
    EndText,
    Failed,
    Finished,
    RateLimit,
    Reply,
    Snapshot,
    Speak,
    SpeechOutcome,
    Started,
    Timings,
    Usage,
    VoiceAccess,
    Word,
)

INITIAL_CREDIT: Final = 16
"""Audio messages that one request may have under way: 1.3 s of single Qwen3-TTS frames, and bounded memory."""

Abort = Callable[[str, ApiError | None], None]
"""Takes the id of a request whose client does not get the rest, and why its response failed; None: the client left."""

PIECE_INTERVAL_S: Final = 0.01
"""The shortest time between two Append messages of a request: pieces that come faster are sent together."""

_CREDIT_BATCH: Final = 4
"""Credits granted at a time: the worker always holds three quarters of them, for a quarter of the messages."""


class Chunk(msgspec.Struct, frozen=True):
    """The next PCM of a speech, 24 kHz mono int16. `rate` and `words`: see shared.protocol.Audio."""

    pcm: bytes
    rate: float | None = 1.0
    words: list[Word] = []


class Speech:
    """One request while the GPU worker speaks it: call `chunk` until it gives None, then read `finished`.

    `rate_limit` is what the request's key has left of its requests a minute; it is there when `chunk` first returns.
    One consumer calls `chunk`. `abort` may be called at any time; it costs a dictionary entry and a message.
    The text of an open request goes on with `append`, until `end_text`.
    `grant(id, n)` lets the worker send `n` more Audio messages. `abort` cancels the request at the worker.
    `write` sends it the text of an open request.
    """

    def __init__(
        self,
        request: Speak,
        *,
        grant: Callable[[str, int], None],
        abort: Abort,
        write: Callable[[Append | EndText], None] = lambda _message: None,
    ) -> None:
        self.id = request.id
        self.rate_limit: RateLimit | None = None
        self.finished: Finished | None = None
        self._write = write
        self._text_open = request.open
        self._unsent_text = ""
        self._piece_timer: asyncio.TimerHandle | None = None
        self._credit = request.credit
        self._grant = grant
        self._abort = abort
        self._chunks: deque[Chunk] = deque()
        self._next_seq = 0
        self._ungranted = 0
        self._in_a_row = 0
        self._error: ApiError | None = None
        self._aborted = False
        self._news = asyncio.Event()

    @property
    def ready(self) -> int:
        """The number of chunks that `chunk` returns without waiting."""
        return len(self._chunks)

    async def chunk(self) -> Chunk | None:
        """The next PCM, or None after the last.

        Raises ApiError if the request failed, after the chunks that arrived before.
        """
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.finished is not None:
                return None
            self._in_a_row = 0
            self._news.clear()
            await self._news.wait()
        self._in_a_row += 1
        if self._in_a_row > 1:  # chunks that are there at once must not hold up others, nor the news that a client left
            await asyncio.sleep(0)
        self._ungranted += 1
        if self._ungranted >= _CREDIT_BATCH and self.finished is None and self._error is None:
            self._grant(self.id, self._ungranted)
            self._ungranted = 0
        return self._chunks.popleft()

    def append(self, text: str, *, flush: bool = False) -> None:
        """Speak more text, which goes on where the text before it ended: also within a word.

        `flush`: speak what there is to its end. Text that follows begins a new utterance.
        Never blocks. Does nothing once the text has ended or the request is over: `chunk` says why.
        """
        if not self._text_open:
            return
        self._unsent_text += text
        if flush:
            self._send_text(flush=True)
        elif self._piece_timer is None:
            self._on_piece_timer()

    def end_text(self) -> None:
        """The text of an open request is complete. Idempotent."""
        if self._text_open:
            self._send_text()
            self._close_text()
            self._write(EndText(id=self.id))

    def _on_piece_timer(self) -> None:
        self._piece_timer = None
        if self._unsent_text:
            self._send_text()
            self._piece_timer = asyncio.get_running_loop().call_later(PIECE_INTERVAL_S, self._on_piece_timer)

    def _send_text(self, *, flush: bool = False) -> None:
        if self._unsent_text or flush:
            text, self._unsent_text = self._unsent_text, ""
            self._write(Append(id=self.id, text=text, flush=flush))

    def _close_text(self) -> None:
        self._text_open = False
        self._unsent_text = ""
        if self._piece_timer is not None:
            self._piece_timer.cancel()
            self._piece_timer = None

    def abort(self, error: ApiError | None = None) -> None:
        """Tell the worker that the client does not get the rest: it left, or its response failed by `error`.

        Synchronous and idempotent; does nothing for a request that the worker has failed.
        """
        if self._error is None and not self._aborted:
            self._aborted = True
            self._close_text()
            self._abort(self.id, error)

    def receive(self, message: Started | Audio | Finished, payload: bytes | None) -> str | None:
        """Record a message of the worker; returns an error message if it breaks the protocol."""
        match message:
            case Started():
                self.rate_limit = message.rate_limit
            case Audio():
                if message.seq != self._next_seq or payload is None:
                    return f"Audio message {self._next_seq} of the GPU worker was lost."
                if len(self._chunks) >= self._credit:
                    return "The GPU worker sent more audio than it had credit for."
                self._next_seq += 1
                self._chunks.append(Chunk(payload, message.rate, message.words))
            case Finished():
                self.finished = message
                self._close_text()
        self._news.set()
        return None

    def fail(self, error: ApiError) -> None:
        """End the request: `chunk` raises `error` after the chunks that have arrived."""
        if self._error is None and self.finished is None:
            self._error = error
            self._close_text()
            self._news.set()


def error_of(failed: Failed) -> ApiError:
    """The error that a Failed describes."""
    return ApiError(
        failed.code,
        failed.message,
        param=failed.param,
        retry_after_s=failed.retry_after_s,
        rate_limit=failed.rate_limit,
    )


def silent_speech(request: Speak, engine: "EngineClient") -> Speech:
    """The speech of a text without anything speakable: its pauses, but EMPTY_S of silence at least.

    It is there at once and without the GPU worker, and its chunks are all the credit it needs.
    `engine` learns of the outcome.
    """
    pause_s = sum(segment.pause_ms for segment in request.segments) / 1000
    chunks = silence(max(EMPTY_S, pause_s))
    enough = msgspec.structs.replace(request, credit=len(chunks))
    speech = Speech(enough, grant=lambda _id, _chunks: None, abort=lambda _id, _error: None)
    for seq, chunk in enumerate(chunks):
        speech.receive(Audio(id=request.id, seq=seq, rate=None), chunk)
    no_time = Timings(queue_s=0.0, load_s=0.0, first_audio_s=0.0, total_s=0.0)
    usage = Usage(input_tokens=0, output_tokens=0)
    finished = Finished(id=request.id, reason="empty", usage=usage, timings=no_time)
    speech.receive(finished, None)
    engine.record(
        SpeechOutcome(
            id=request.id,
            client=request.client,
            status="done",
            model=request.model,
            voice=request.voice,
            finish_reason=finished.reason,
            usage=usage,
            timings=no_time,
        )
    )
    return speech


class EngineClient(Protocol):
    """The engine as routes use it, wherever it runs."""

    @property
    def catalog(self) -> list[ModelSpec]:
        """The models of the GPU worker, as of the last connection; empty before the first."""

    @property
    def snapshot(self) -> Snapshot | None:
        """The worker's latest snapshot, of whatever age; None before the first connection.

        In a cluster, it is one of all GPU workers together.
        """

    @property
    def worker_settings(self) -> dict[str, Any]:
        """The worker's settings by their public names, as of the last connection; empty before the first."""

    async def use_variables(self, variables: dict[str, str]) -> None:
        """Let the GPU worker that is there, and each one that comes, take these settings; "" is one that is unset.

        Returns when the one that is there has taken them. Never raises: a worker that is gone takes them when it comes.
        """

    def reports(self) -> dict[str, ReplicaReport]:
        """The latest report of each replica of a cluster, by its id; empty without a cluster."""

    def unavailable(self) -> ApiError | None:
        """The error (`worker_unavailable`) if the worker is not there or has not answered for seconds; else None.

        A request may still be sent to a worker that is silent: `speak` and `call` wait longer for it.
        """

    async def worker_loss(self) -> ApiError:
        """Wait until the GPU worker is lost that is there now, or that comes next; the error of its requests."""

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A snapshot that is at most `max_age_s` old; ApiError (`worker_unavailable`) if none arrives in time."""

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        """Send a speech request, with the PCM of its reference; ApiError (`worker_unavailable`) without a worker."""

    def record(self, outcome: SpeechOutcome) -> None:
        """Let the worker keep the outcome of a request that was answered without it."""

    async def call(
        self,
        action: Action,
        *,
        client: str,
        access: VoiceAccess = SHARED_VOICES,
        payload: bytes | None = None,
        timeout_s: float,
    ) -> Reply:
        """Send an admin or voice action and wait for its reply. Actions on voices need the `access` of their client.

        Raises ApiError with the worker's code if the action failed, `worker_unavailable` if no reply came in time.
        """
