"""EngineClient over ZeroMQ: the requests and calls in flight.

This module must not know HTTP, audio formats or what a request means. It never blocks the event loop.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import Any, Final, Self

import structlog

from server.engine.client import Speech, error_of
from server.engine.outage import unavailable_error
from server.engine.reports import ReplicaReport
from server.engine.web_process import WebProcess
from server.engine.zmq.connection import Connection, SmallMessage
from server.engine.zmq.session import PING_INTERVAL_S, STALE_AFTER_S, WorkerSession
from server.http.errors import ApiError, internal_error
from shared.catalog import ModelSpec
from shared.protocol import (
    SHARED_VOICES,
    Action,
    Audio,
    Call,
    Cancel,
    Credit,
    Failed,
    Finished,
    FromWorker,
    Message,
    Pong,
    Probe,
    ProtocolError,
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

_RELOAD_TIMEOUT_S: Final = 5.0

_WELCOME_S: Final = 0.5
"""Time for the GPU worker's Welcome before the first request: two ticks, if the first Hello found no room."""


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
        self._session = WorkerSession(
            url,
            token,
            timeout_s=timeout_s,
            clock=clock,
            web=web or WebProcess(),
            send=self._send,
            on_silence=self._fail_all,
            on_new_worker=self._on_new_worker,
        )
        self._variables: dict[str, str] = {}
        """The settings for each GPU worker that comes."""
        self._speeches: dict[str, Speech] = {}
        self._calls: dict[str, asyncio.Future[Reply]] = {}

    # --- what routes use ---------------------------------------------------------------------------------------------

    @property
    def catalog(self) -> list[ModelSpec]:
        return self._session.catalog

    @property
    def snapshot(self) -> Snapshot | None:
        return self._session.snapshot

    @property
    def snapshot_age_s(self) -> float:
        """Seconds since the latest snapshot was asked for."""
        return self._session.snapshot_age_s

    @property
    def worker_settings(self) -> dict[str, Any]:
        return self._session.settings

    def reports(self) -> dict[str, ReplicaReport]:
        return {}

    def unavailable(self) -> ApiError | None:
        return self._session.outage(STALE_AFTER_S)

    async def worker_loss(self) -> ApiError:
        return await self._session.loss()

    async def fresh_snapshot(self, max_age_s: float) -> Snapshot:
        return await self._session.fresh_snapshot(max_age_s)

    def speak(self, request: Speak, reference: bytes | None = None, *, relayed: bool = False) -> Speech:
        """With `relayed`, the chunks go on to another process, whose credit comes through `grant`."""
        self._send_now(request, reference)
        speech = self._speeches[request.id] = Speech(
            request,
            grant=_no_credit if relayed else self.grant,
            abort=self._abort,
            write=self._send_if_connected,
        )
        return speech

    def _send_now(self, message: Speak | Call, payload: bytes | None) -> None:
        self._session.require_worker()
        try:
            sent = self._connection.send(message, payload)
        except ProtocolError as error:
            raise ApiError("internal_error", f"The GPU worker cannot read this request; it is {error}.") from error
        if not sent:
            raise unavailable_error("The GPU worker cannot be reached.")

    def record(self, outcome: SpeechOutcome) -> None:
        if self._session.connected:
            self._connection.send(Spoken(outcome=outcome))

    def tell_use(self, used: UsedElsewhere) -> None:
        """Tell the worker what clients have used elsewhere; without a connection, the next news come soon."""
        if self._session.connected:
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
        call = Call(id=uuid.uuid4().hex, client=client, access=access, action=action)
        self._send_now(call, payload)
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call.id] = reply
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise unavailable_error(f"The GPU worker did not answer within {timeout_s:.0f} s.") from None
        finally:
            self._calls.pop(call.id, None)
            if reply.cancelled():
                self.cancel(call.id)

    async def use_variables(self, variables: dict[str, str]) -> None:
        self._variables = variables
        if not variables or not self._session.connected:
            return
        try:
            await self.call(Reload(variables=variables), client="", timeout_s=_RELOAD_TIMEOUT_S)
        except ApiError as error:
            log.warning("worker_keeps_its_settings", code=error.code, reason=error.message)

    # --- the connection's life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._connection = Connection(
            self._url, on_connected=self._session.hello, on_lost=self._on_lost, on_message=self._handle
        )
        self._ticking = asyncio.create_task(self._tick_forever())
        try:
            # A web worker that has just started must not refuse requests while a GPU worker is there.
            await self._session.wait_connected(_WELCOME_S)
        except asyncio.CancelledError:
            await self.__aexit__()
            raise
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
            try:
                self._tick()
            except Exception:  # without pings, the worker would end the lease of this process
                log.exception("worker_tick_failed")
            await asyncio.sleep(PING_INTERVAL_S)

    def _tick(self) -> None:
        self._connection.send_kept()
        self._session.tick()

    def _send(self, message: Message) -> bool:
        return self._connection.send(message)

    def _on_new_worker(self) -> None:
        if self._variables:
            self._connection.send(Call(id=uuid.uuid4().hex, client="", action=Reload(variables=self._variables)))

    def _on_lost(self) -> None:
        if self._session.connected:
            log.warning("worker_lost", in_flight=len(self._speeches) + len(self._calls))
        self._session.disconnect()
        self._fail_all("The GPU worker went away.")

    def _fail_all(self, message: str) -> None:
        self._session.note_loss(message)
        speeches, self._speeches = self._speeches, {}
        for speech in speeches.values():
            error = unavailable_error(message)
            speech.fail(error)
            self.cancel(speech.id, error)
        for call_id, reply in self._calls.items():
            if not reply.done():
                reply.set_exception(unavailable_error(message))
                self.cancel(call_id)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _handle(self, message: FromWorker, payload: bytes | None) -> None:
        try:
            self._dispatch(message, payload)
        except Exception:  # the messages of other requests must be handled
            log.exception("worker_message_not_handled", kind=type(message).__name__)
            if speech := self._speeches.get(getattr(message, "id", "")):
                speech.abort(internal_error())

    def _dispatch(self, message: FromWorker, payload: bytes | None) -> None:
        match message:
            case Audio() | Started() | Finished():
                self._handle_speech(message, payload)
            case Failed():
                self._handle_failure(message)
            case Reply():
                if message.settings:
                    self._session.settings = message.settings
                reply = self._calls.get(message.id)
                if reply is not None and not reply.done():
                    reply.set_result(message)
            case Pong():
                self._session.on_pong(message)
            case Welcome():
                self._session.on_welcome(message)
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
            self._session.on_refused(failed)
        elif failed.id in self._speeches:
            self._speeches.pop(failed.id).fail(error)
        elif failed.id in self._calls and not self._calls[failed.id].done():
            self._calls[failed.id].set_exception(error)

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
        if self._session.connected:
            self._connection.send_or_keep(message)


def _no_credit(_request_id: str, _chunks: int) -> None:
    pass
