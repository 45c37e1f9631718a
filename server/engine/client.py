"""What routes may ask of the engine, wherever it runs, and one request while it is being spoken.

It knows neither HTTP nor sockets: the client over ZeroMQ is zmq_engine.py's, another transport could stand beside it.
"""

import asyncio
from collections import deque
from typing import Any, Final, Protocol

from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import Action, Audio, Finished, Reply, Snapshot, Speak, Started

INITIAL_CREDIT: Final = 16
"""Audio messages that one request may have under way: 1.3 s of single Qwen3-TTS frames, and bounded memory."""

_CREDIT_BATCH: Final = 4
"""Credits granted at a time: the worker always holds three quarters of them, for a quarter of the messages."""


class SpeechOwner(Protocol):
    """Whom a Speech tells what its consumer does."""

    def grant(self, request_id: str, chunks: int) -> None:
        """The consumer has taken `chunks` more pieces of sound."""
        ...

    def abort(self, request_id: str) -> None:
        """The consumer wants no more."""
        ...


class Speech:
    """One request being spoken: first `started`, then `chunk` until it gives None, then `finished` says how it went.

    One consumer pulls; `abort` may be called at any time, and is no more than a dictionary entry and a message.
    """

    def __init__(self, request: Speak, owner: "SpeechOwner") -> None:
        self.id = request.id
        self.finished: Finished | None = None
        self._owner = owner
        self._credit = request.credit
        self._started: Started | None = None
        self._chunks: deque[bytes] = deque()
        self._next_seq = 0
        self._taken = 0
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def started(self) -> Started:
        """Wait until the request holds a slot; ApiError where it never will."""
        while self._started is None:
            if self._error is not None:
                raise self._error
            await self._wait()
        return self._started

    async def chunk(self) -> bytes | None:
        """The next PCM (24 kHz mono int16 little-endian), None when everything was said; ApiError where it failed."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self.finished is not None:
                return None
            await self._wait()
        self._taken += 1
        if self._taken >= _CREDIT_BATCH and self.finished is None and self._error is None:
            self._owner.grant(self.id, self._taken)
            self._taken = 0
        return self._chunks.popleft()

    def abort(self) -> None:
        """Nobody listens any more. Synchronous, idempotent, and without effect once everything has arrived."""
        self._owner.abort(self.id)

    def take(self, message: Started | Audio | Finished, payload: bytes | None) -> str | None:
        """Take what the worker sent; the answer says what is wrong with it, if anything."""
        match message:
            case Started():
                self._started = message
            case Audio():
                if message.seq != self._next_seq or payload is None:
                    return f"sound {self._next_seq} of the answer was lost on the way"
                if len(self._chunks) >= self._credit:
                    return "the GPU worker sent more than it was given credit for"
                self._next_seq += 1
                self._chunks.append(payload)
            case Finished():
                self.finished = message
        self._wake()
        return None

    def fail(self, error: ApiError) -> None:
        """The request ends here; whoever pulls gets `error` after the chunks that had already arrived."""
        if self._error is None and self.finished is None:
            self._error = error
            self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient(Protocol):
    """What routes may ask of the engine, wherever it runs."""

    @property
    def catalog(self) -> list[ModelSpec]:
        """The models that the worker named when it was last met; empty before that."""
        ...

    @property
    def snapshot(self) -> Snapshot | None:
        """The worker's last word about itself; None before the first."""
        ...

    @property
    def worker_settings(self) -> dict[str, Any]:
        """The worker's settings in force under their public names, when it was last met; empty before that."""
        ...

    def trouble(self) -> str | None:
        """Why nothing can be asked of the worker now; None when all is well."""
        ...

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A snapshot at most so old; ApiError (`worker_unavailable`) where there is none to be had."""
        ...

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        """Ask for speech; ApiError (`worker_unavailable`) at once where there is no worker."""
        ...

    async def call(self, action: Action, *, client: str, payload: bytes | None = None, timeout_s: float) -> Reply:
        """Ask for something else and wait for it; ApiError as the worker says, or where it does not answer."""
        ...

    def abort(self, request_id: str) -> None:
        """Forget a request that is being spoken; synchronous and idempotent."""
        ...
