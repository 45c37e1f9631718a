"""EngineClient over ZeroMQ: handshake, pings, and the requests and calls in flight.

This module must not know HTTP, audio formats or what a request means. It never blocks the event loop.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, Self

import msgspec
import structlog

from server.engine.client import Speech, error_of
from server.engine.connection import Connection, SmallMessage
from server.engine.outage import OutageFile
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.http.errors import ApiError
from shared.catalog import ModelSpec
from shared.protocol import (
    SHARED_VOICES,
    VERSION,
    Action,
    Audio,
    CacheName,
    Call,
    Cancel,
    Credit,
    Failed,
    Finished,
    FromWorker,
    Hello,
    Pong,
    Probe,
    Reload,
    Reply,
    Snapshot,
    Speak,
    SpeechError,
    SpeechOutcome,
    Spoken,
    Started,
    UsedElsewhere,
    VoiceAccess,
    Welcome,
)

log = structlog.get_logger(__name__)

PING_INTERVAL_S: Final = 0.2
STALE_AFTER_S: Final = 5.0
"""The service is not ready after so long without a Pong. Requests are still sent: a pause is not a death."""

_PAUSED_AFTER_S: Final = 1.0
"""A tick that comes so late means that this process was paused."""

_FRESH_WITHIN_S: Final = 1.0
_HELLO_INTERVAL_S: Final = 1.0
_RELOAD_TIMEOUT_S: Final = 5.0
_RETRY_AFTER_S: Final = 5.0
"""When to try again if no supervisor on this machine knows when the GPU worker will be back."""

_LONGEST_RETRY_S: Final = 60.0
"""OpenAI's clients do not obey a longer Retry-After."""


class ZmqEngineClient:
    """EngineClient over ZeroMQ: an async context manager, used on one event loop.

    After `timeout_s` without a Pong the GPU worker counts as lost: requests fail, and new ones are refused.
    `clock` gives seconds and never goes back.
    """

    _connection: Connection
    _ticking: asyncio.Task[None]

    def __init__(
        self,
        url: str,
        token: str,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        web: WebProcess | None = None,
    ) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._outage_file = OutageFile(url)
        self._token = token
        self._clock = clock
        self._welcome: Welcome | None = None
        """The last one, which outlives its worker; `_connected` tells whether that worker is still there."""
        self._connected = False
        self._refusal: str | None = None
        self._hello_at: float | None = None
        self._snapshot: Snapshot | None = None
        self._snapshot_asked_at = -math.inf
        self._heard_at = 0.0
        self._pinged_at = 0.0
        self._ping_out = False
        self._ticked_at = 0.0
        self._web = web or WebProcess()
        self._news = asyncio.Event()
        """Set, and replaced, by the next snapshot and by the loss of the worker."""
        self._loss: asyncio.Future[ApiError] | None = None
        """Set at the loss of the worker; None if nothing waits for that."""
        self._variables: dict[str, str] = {}
        """The settings for each GPU worker that comes."""
        self._speeches: dict[str, Speech] = {}
        self._calls: dict[str, asyncio.Future[Reply]] = {}

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        self._web.count_catalog(hit=self._welcome is not None)
        return [] if self._welcome is None else self._welcome.catalog

    @property
    def snapshot(self) -> Snapshot | None:
        return self._snapshot

    @property
    def snapshot_age_s(self) -> float:
        """Seconds since the latest snapshot was asked for."""
        return self._clock() - self._snapshot_asked_at

    @property
    def worker_settings(self) -> dict[str, Any]:
        return self._welcome.settings if self._welcome else {}

    def reports(self) -> dict[str, ReplicaReport]:
        return {}

    def unavailable(self) -> ApiError | None:
        return self._outage(STALE_AFTER_S)

    def _outage(self, patience_s: float) -> ApiError | None:
        """The error if there is no GPU worker, or if it has been silent for more than `patience_s`."""
        if self._refusal is not None:
            return _unavailable(self._refusal)
        if not self._connected:
            outage = self._outage_file.read()
            if outage is None:
                return _unavailable("The GPU worker is not there; it is starting, or it has died.")
            return _unavailable(outage.reason, outage.retry_after_s())
        silent_s = self._clock() - self._heard_at
        if silent_s > patience_s:
            left_s = max(0.0, self._timeout_s - silent_s)
            reason = f"The GPU worker has not answered for {silent_s:.0f} s"
            return _unavailable(f"{reason}; it is replaced after {self._timeout_s:.0f} s.", left_s + _RETRY_AFTER_S)
        return None

    async def worker_loss(self) -> ApiError:
        if self._loss is None:
            self._loss = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._loss)

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        self._require_worker()
        oldest = self._clock() - max_age_s
        try:
            async with asyncio.timeout(_FRESH_WITHIN_S):
                # The Pong to a ping that is already out may be older than `oldest`.
                while self._snapshot is None or self._snapshot_asked_at < oldest:
                    self._ping()
                    await self._news.wait()
                    self._require_worker()
                return self._snapshot
        except TimeoutError:
            raise _unavailable("The GPU worker does not answer.") from None

    def speak(self, request: Speak, reference: bytes | None = None, *, relayed: bool = False) -> Speech:
        """With `relayed`, the chunks go on to another process, whose credit comes through `grant`."""
        self._require_worker()
        if not self._connection.send(request, reference):
            raise _unavailable("The GPU worker cannot be reached.")
        speech = self._speeches[request.id] = Speech(
            request,
            grant=_no_credit if relayed else self.grant,
            abort=self._abort,
            write=self._send_if_connected,
        )
        return speech

    def record(self, outcome: SpeechOutcome) -> None:
        if self._connected:
            self._connection.send(Spoken(outcome=outcome))

    def tell_use(self, used: UsedElsewhere) -> None:
        """Tell the worker what clients have used elsewhere; without a connection, the next news come soon."""
        if self._connected:
            self._connection.send(used)

    async def call(
        self,
        action: Action,
        *,
        client: str,
        access: VoiceAccess = SHARED_VOICES,
        payload: bytes | None = None,
        timeout_s: float,
    ) -> Reply:
        """After a timeout, or where the caller is cancelled, the call is cancelled at the worker too."""
        self._require_worker()
        call = Call(id=uuid.uuid4().hex, client=client, access=access, action=action)
        if not self._connection.send(call, payload):
            raise _unavailable("The GPU worker cannot be reached.")
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call.id] = reply
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise _unavailable(f"The GPU worker did not answer within {timeout_s:.0f} s.") from None
        finally:
            self._calls.pop(call.id, None)
            if reply.cancelled():
                self.cancel(call.id)

    async def use_variables(self, variables: dict[str, str]) -> None:
        self._variables = variables
        if not variables or not self._connected:
            return
        try:
            await self.call(Reload(variables=variables), client="", timeout_s=_RELOAD_TIMEOUT_S)
        except ApiError as error:
            log.warning("worker_keeps_its_settings", code=error.code, reason=error.message)

    # --- the connection's life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._ticked_at = self._clock()
        self._connection = Connection(
            self._url, on_connected=self._hello, on_lost=self._on_lost, on_message=self._handle
        )
        self._ticking = asyncio.create_task(self._tick_forever())
        return self

    async def __aexit__(self, *_exception: object) -> None:
        for speech in list(self._speeches.values()):
            speech.abort(ApiError("shutting_down", "The server is shutting down."))
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        self._fail_all("The server is shutting down.")
        await self._connection.close()

    async def _tick_forever(self) -> None:
        while True:
            self._tick()
            await asyncio.sleep(PING_INTERVAL_S)

    def _tick(self) -> None:
        now = self._clock()
        # After a pause of this process, the worker's messages may still lie unread in the socket.
        paused, self._ticked_at = now - self._ticked_at > _PAUSED_AFTER_S, now
        self._connection.send_kept()
        if not self._connected:
            # The handshake may have come before the monitor ran, and a Hello may have found no room.
            if self._hello_at is None or now - self._hello_at > _HELLO_INTERVAL_S:
                self._hello()
            return
        if paused:
            self._heard_at = now
        elif now - self._heard_at > self._timeout_s:
            self._fail_all(f"The GPU worker has not answered for {self._timeout_s:.0f} s.")
        self._ping()

    def _hello(self) -> None:
        if self._connection.send(Hello(version=VERSION, token=self._token)):
            self._hello_at = self._clock()

    def _ping(self) -> None:
        if not self._ping_out:
            self._pinged_at = self._clock()
            ping = self._web.ping()
            self._ping_out = self._connection.send(ping)
            if not self._ping_out:
                self._web.take_back(ping)

    def _on_lost(self) -> None:
        if self._connected:
            log.warning("worker_lost", in_flight=len(self._speeches) + len(self._calls))
        self._connected = False
        self._refusal = None
        self._hello_at = None
        self._ping_out = False
        self._fail_all("The GPU worker went away.")

    def _fail_all(self, message: str) -> None:
        if self._loss is not None:
            self._loss.set_result(_unavailable(message))
            self._loss = None
        speeches, self._speeches = self._speeches, {}
        for speech in speeches.values():
            error = _unavailable(message)
            speech.fail(error)
            self.cancel(speech.id, error)
        for call_id, reply in self._calls.items():
            if not reply.done():
                reply.set_exception(_unavailable(message))
                self.cancel(call_id)
        self._tell_waiters()

    # --- messages ----------------------------------------------------------------------------------------------------

    def _handle(self, message: FromWorker, payload: bytes | None) -> None:
        match message:
            case Audio() | Started() | Finished():
                self._handle_speech(message, payload)
            case Failed():
                self._handle_failure(message)
            case Reply():
                if message.settings and self._welcome is not None:
                    self._welcome = msgspec.structs.replace(self._welcome, settings=message.settings)
                reply = self._calls.get(message.id)
                if reply is not None and not reply.done():
                    reply.set_result(message)
            case Pong():
                if self._connected and self._welcome and message.boot_id == self._welcome.boot_id:
                    self._ping_out = False
                    self._record_snapshot(message.snapshot, self._pinged_at)
            case Welcome():
                self._handle_welcome(message)
            case Probe():
                pass

    def _handle_speech(self, message: Audio | Started | Finished, payload: bytes | None) -> None:
        speech = self._speeches.get(message.id)
        if speech is None:
            return  # aborted a moment ago
        problem = speech.receive(message, payload)
        if problem is not None:
            speech.abort(ApiError("synthesis_failed", problem))
        elif isinstance(message, Finished):
            del self._speeches[message.id]

    def _handle_failure(self, failed: Failed) -> None:
        error = error_of(failed)
        if failed.code == "hello_expected":
            # This process was stopped for longer than its lease, and the worker has cancelled its requests.
            self._on_lost()
        elif not failed.id:
            self._refusal = f"The GPU worker refuses this server: {failed.message}"
            log.error("worker_refused_hello", code=failed.code, reason=failed.message)
        elif failed.id in self._speeches:
            self._speeches.pop(failed.id).fail(error)
        elif failed.id in self._calls and not self._calls[failed.id].done():
            self._calls[failed.id].set_exception(error)

    def _handle_welcome(self, welcome: Welcome) -> None:
        if self._hello_at is None:
            return  # it answers a Hello of a connection that is gone
        if welcome.version != VERSION:
            self._refusal = f"The GPU worker speaks version {welcome.version} of the protocol, this server {VERSION}."
            log.error("worker_version_differs", worker_version=welcome.version, server_version=VERSION)
            return
        if not self._connected or self._welcome is None or self._welcome.boot_id != welcome.boot_id:
            log.info("worker_connected", pid=welcome.snapshot.pid, boot_id=welcome.boot_id)
            if self._variables:
                self._connection.send(Call(id=uuid.uuid4().hex, client="", action=Reload(variables=self._variables)))
        self._refusal = None
        self._connected = True
        self._welcome = welcome
        self._record_snapshot(welcome.snapshot, self._hello_at)

    def _record_snapshot(self, snapshot: Snapshot, asked_at: float) -> None:
        """`asked_at` is when the Ping or Hello was sent that `snapshot` answers."""
        before = self._snapshot
        self._snapshot = snapshot
        if before is not None and before.boot_id == snapshot.boot_id:
            self._empty_caches([name for name, times in snapshot.emptied.items() if times != before.emptied.get(name)])
        self._snapshot_asked_at = asked_at
        self._heard_at = self._clock()
        self._tell_waiters()

    def _empty_caches(self, names: list[CacheName]) -> None:
        for name in names:
            if name == "catalog":
                self._hello()  # the Welcome has it
            else:
                self._web.on_emptied(name)

    def _tell_waiters(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _require_worker(self) -> None:
        error = self._outage(self._timeout_s)
        if error is not None:
            raise error

    def grant(self, request_id: str, chunks: int) -> None:
        """Let the worker send more chunks of a request."""
        self._send_if_connected(Credit(id=request_id, chunks=chunks))

    def _abort(self, request_id: str, error: ApiError | None) -> None:
        speech = self._speeches.pop(request_id, None)
        if speech is not None:
            speech.fail(error or ApiError("synthesis_failed", "The request was aborted."))
        self.cancel(request_id, error)

    def cancel(self, request_or_call_id: str, error: ApiError | None = None) -> None:
        """Tell the worker that the client does not get the rest of a request, also of one that has ended."""
        reason = SpeechError(code=error.code, message=error.message, param=error.param) if error else None
        self._send_if_connected(Cancel(id=request_or_call_id, error=reason))

    def _send_if_connected(self, message: SmallMessage) -> None:
        """A new worker knows nothing of the requests of the old one."""
        if self._connected:
            self._connection.send_or_keep(message)


def _no_credit(_request_id: str, _chunks: int) -> None:
    pass


def _unavailable(message: str, retry_after_s: float = _RETRY_AFTER_S) -> ApiError:
    return ApiError("worker_unavailable", message, retry_after_s=min(max(1.0, retry_after_s), _LONGEST_RETRY_S))
