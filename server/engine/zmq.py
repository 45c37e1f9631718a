"""EngineClient over ZeroMQ: the web side's end of the conversation, one DEALER a web process.

It owns the connection, the pings, the requests in flight and their credits.
It must not know HTTP, audio formats or what a request means; it never blocks the event loop and never waits to send.
"""

import asyncio
import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Self

import structlog
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from server.engine.client import Speech
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    VERSION,
    Action,
    Audio,
    Call,
    Cancel,
    Credit,
    Failed,
    Finished,
    FromWorker,
    Hello,
    Message,
    Ping,
    Pong,
    ProtocolError,
    Reply,
    Snapshot,
    Speak,
    Started,
    Welcome,
    decode_from_worker,
    encode,
)
from shared.sockets import connect_dealer

_log = structlog.stdlib.get_logger(__name__)

PING_INTERVAL_S: Final = 0.2
STALE_AFTER_S: Final = 5.0
"""Without a Pong for so long the worker is not ready, and new requests are refused."""

LOST_AFTER_S: Final = 20.0
"""Without a Pong for so long the requests in flight fail rather than hang."""

_FRESH_WITHIN_S: Final = 1.0
_HELLO_AGAIN_S: Final = 1.0
_RETRY_AFTER_S: Final = 1.0
"""The worker is back within 3 s of its death; a client that tries again after 1 s loses little."""

_MESSAGES_A_TURN: Final = 32
"""Messages taken off the socket before the event loop gets a turn: a ready receive never suspends by itself."""


class ZmqEngineClient:
    """EngineClient over ZeroMQ. Made inside a running event loop; use it as an async context manager.

    `clock` gives seconds and never goes back.
    """

    def __init__(self, url: str, token: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._token = token
        self._clock = clock
        self._context = zmq.asyncio.Context()
        self._dealer: Any = None  # pyzmq's asyncio sockets are untyped where they differ from the plain ones
        self._tasks: list[asyncio.Task[None]] = []
        self._welcome: Welcome | None = None
        self._catalog: list[ModelSpec] = []
        self._worker_settings: dict[str, Any] = {}
        self._snapshot: Snapshot | None = None
        self._refusal: str | None = None
        self._hello_at: float | None = None
        self._heard_at = 0.0
        # When the question went out whose answer the snapshot is, and that of the ping that is out.
        self._asked_at = -math.inf
        self._pinged_at = 0.0
        self._ticked_at = 0.0
        self._ping_out = False
        self._pong_waiters: set[asyncio.Future[None]] = set()
        self._speeches: dict[str, Speech] = {}
        self._calls: dict[str, asyncio.Future[Reply]] = {}
        self._unsent: deque[Credit | Cancel] = deque()

    # --- the surface -------------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        """The models that the worker named when it was last met; empty before that."""
        return self._catalog

    @property
    def snapshot(self) -> Snapshot | None:
        """The worker's last word about itself; None before the first."""
        return self._snapshot

    @property
    def worker_settings(self) -> dict[str, Any]:
        """The worker's settings in force under their public names, when it was last met; empty before that."""
        return self._worker_settings

    def trouble(self) -> str | None:
        """Why nothing can be asked of the worker now; None when all is well."""
        if self._refusal is not None:
            return self._refusal
        if self._welcome is None:
            return "The GPU worker is not there (it is starting, or it has died and is being restarted)."
        silent_s = self._clock() - self._heard_at
        if silent_s > STALE_AFTER_S:
            return f"The GPU worker has not answered for {silent_s:.0f} s."
        return None

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        """A snapshot at most so old; ApiError (`worker_unavailable`) where there is none to be had within a second."""
        self._require_worker()
        wanted_at = self._clock() - max_age_s
        try:
            async with asyncio.timeout(_FRESH_WITHIN_S):
                # The answer to a ping that is out already may be older than what the caller has just been told.
                while self._asked_at < wanted_at:
                    self._ping()
                    await self._next_pong()
                    self._require_worker()
        except TimeoutError:
            raise _unavailable("The GPU worker does not answer.") from None
        if self._snapshot is None:
            raise _unavailable("The GPU worker does not answer.")
        return self._snapshot

    def speak(self, request: Speak, reference: bytes | None = None) -> Speech:
        """Ask for speech; ApiError (`worker_unavailable`) at once where there is no worker."""
        self._require_worker()
        if not self._send(request, reference):
            raise _unavailable("The GPU worker cannot be reached.")
        speech = Speech(request, self)
        self._speeches[request.id] = speech
        return speech

    async def call(self, action: Action, *, client: str, payload: bytes | None = None, timeout_s: float) -> Reply:
        """Ask for something else and wait for it; ApiError as the worker says, or where it does not answer.

        Where nobody waits any more, because time is up or the caller was cancelled, the worker is told.
        """
        self._require_worker()
        call = Call(id=uuid.uuid4().hex, client=client, action=action)
        if not self._send(call, payload):
            raise _unavailable("The GPU worker cannot be reached.")
        answered: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call.id] = answered
        try:
            async with asyncio.timeout(timeout_s):
                return await answered
        except TimeoutError:
            raise _unavailable(f"The GPU worker did not answer within {timeout_s:.0f} s.") from None
        finally:
            self._calls.pop(call.id, None)
            if answered.cancelled():
                self._send_or_keep(Cancel(id=call.id))

    def abort(self, request_id: str) -> None:
        """Forget a request that is being spoken; synchronous and idempotent."""
        speech = self._speeches.pop(request_id, None)
        if speech is not None:
            speech.fail(ApiError("synthesis_failed", "The request was aborted."))
            self._send_or_keep(Cancel(id=request_id))

    def grant(self, request_id: str, chunks: int) -> None:
        """Let the worker send `chunks` more messages of sound; for Speech."""
        self._send_or_keep(Credit(id=request_id, chunks=chunks))

    # --- the connection's life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._dealer = connect_dealer(self._context, self._url)
        monitor = self._dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._ticked_at = self._clock()
        self._tasks = [
            asyncio.create_task(self._watch(monitor), name="engine monitor"),
            asyncio.create_task(self._receive(), name="engine receive"),
            asyncio.create_task(self._beat(), name="engine beat"),
        ]
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for request_id in list(self._speeches):
            self.abort(request_id)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all("The server is shutting down.")
        # Not LINGER 0: the cancels above have to leave.
        self._dealer.set(zmq.LINGER, 200)
        self._context.destroy()

    async def _watch(self, monitor: Any) -> None:
        while True:
            event = await recv_monitor_message(monitor)
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._hello()
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._lose("The GPU worker went away.")

    async def _receive(self) -> None:
        taken = 0
        while True:
            frames: list[bytes] = await self._dealer.recv_multipart()
            try:
                self._take(*decode_from_worker(frames))
            except ProtocolError as error:
                _log.warning("message of the GPU worker not understood", error=str(error))
            taken += 1
            if taken % _MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)

    async def _beat(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(PING_INTERVAL_S)

    def _tick(self) -> None:
        now = self._clock()
        # After this process itself has been paused, the worker's words may still lie unread in the socket.
        paused, self._ticked_at = now - self._ticked_at > 1.0, now
        while self._unsent and self._send(self._unsent[0]):
            self._unsent.popleft()
        if self._welcome is None:
            # The handshake may have happened before anyone watched, and a Hello may have found no room.
            if self._hello_at is None or now - self._hello_at > _HELLO_AGAIN_S:
                self._hello()
            return
        if not paused and now - self._heard_at > LOST_AFTER_S:
            self._fail_all("The GPU worker has stopped answering.")
        self._ping()

    def _hello(self) -> None:
        if self._send(Hello(version=VERSION, token=self._token)):
            self._hello_at = self._clock()

    def _ping(self) -> None:
        if not self._ping_out:
            self._pinged_at = self._clock()
            self._ping_out = self._send(Ping())

    async def _next_pong(self) -> None:
        """Wait for the worker's next word about itself, or until it is lost."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pong_waiters.add(waiter)
        try:
            await waiter
        finally:
            self._pong_waiters.discard(waiter)

    def _lose(self, why: str) -> None:
        if self._welcome is not None:
            _log.warning("GPU worker lost", in_flight=len(self._speeches) + len(self._calls))
        self._welcome = None
        self._refusal = None
        self._hello_at = None
        self._ping_out = False
        self._unsent.clear()
        self._fail_all(why)

    def _fail_all(self, why: str) -> None:
        speeches, self._speeches = self._speeches, {}
        for speech in speeches.values():
            speech.fail(_unavailable(why))
            if self._welcome is not None:
                self._send_or_keep(Cancel(id=speech.id))
        for call_id, answered in self._calls.items():
            if not answered.done():
                answered.set_exception(_unavailable(why))
                if self._welcome is not None:
                    self._send_or_keep(Cancel(id=call_id))
        for waiter in self._pong_waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _take(self, message: FromWorker, payload: bytes | None) -> None:
        match message:
            case Audio() | Started() | Finished():
                self._take_speech(message, payload)
            case Failed():
                self._take_failure(message)
            case Reply():
                answered = self._calls.get(message.id)
                if answered is not None and not answered.done():
                    answered.set_result(message)
            case Pong():
                if self._welcome is not None and message.boot_id == self._welcome.boot_id:
                    self._ping_out = False
                    self._take_snapshot(message.snapshot, self._pinged_at)
            case Welcome():
                self._take_welcome(message)

    def _take_speech(self, message: Audio | Started | Finished, payload: bytes | None) -> None:
        speech = self._speeches.get(message.id)
        if speech is None:
            return  # aborted a moment ago
        wrong = speech.take(message, payload)
        if wrong is not None:
            speech.fail(ApiError("synthesis_failed", f"{wrong[0].upper()}{wrong[1:]}."))
            self.abort(message.id)
        elif isinstance(message, Finished):
            del self._speeches[message.id]

    def _take_failure(self, failed: Failed) -> None:
        error = ApiError(failed.code, failed.message, param=failed.param, retry_after_s=failed.retry_after_s)
        if not failed.id:
            self._refusal = f"The GPU worker refuses this server: {failed.message}"
            _log.error("GPU worker refuses", code=failed.code, reason=failed.message)
        elif failed.id in self._speeches:
            self._speeches.pop(failed.id).fail(error)
        elif failed.id in self._calls and not self._calls[failed.id].done():
            self._calls[failed.id].set_exception(error)

    def _take_welcome(self, welcome: Welcome) -> None:
        if self._hello_at is None:
            return  # of a connection that is gone
        if welcome.version != VERSION:
            self._refusal = f"The GPU worker speaks version {welcome.version} of the protocol, this server {VERSION}."
            _log.error("GPU worker of another version", theirs=welcome.version, ours=VERSION)
            return
        if self._welcome is None or self._welcome.boot_id != welcome.boot_id:
            _log.info("GPU worker met", pid=welcome.snapshot.pid, boot_id=welcome.boot_id)
        self._refusal = None
        self._welcome = welcome
        self._catalog = welcome.catalog
        self._worker_settings = welcome.settings
        self._take_snapshot(welcome.snapshot, self._hello_at)

    def _take_snapshot(self, snapshot: Snapshot, asked_at: float) -> None:
        self._snapshot = snapshot
        self._asked_at = asked_at
        self._heard_at = self._clock()
        for waiter in self._pong_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _require_worker(self) -> None:
        trouble = self.trouble()
        if trouble is not None:
            raise _unavailable(trouble)

    def _send(self, message: Message, payload: bytes | None = None) -> bool:
        """Whether the message went out; it does not, at once, where no worker is connected or its queue is full."""
        try:
            sent = self._dealer.send_multipart(encode(message, payload), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        # With NOBLOCK the future is done when it is returned.
        return sent.exception() is None

    def _send_or_keep(self, message: Credit | Cancel) -> None:
        """Send a word that must not get lost on a full queue; a lost connection makes it moot."""
        if self._welcome is not None and not self._send(message):
            self._unsent.append(message)


def _unavailable(message: str) -> ApiError:
    return ApiError("worker_unavailable", message, retry_after_s=_RETRY_AFTER_S)
