"""One WebSocket that speaks, whatever its dialect: its life from the handshake to the close.

SpeechSocket waits for the configuration, takes messages while it speaks, and ends for one reason. The close names it:
the client is done, the client made a mistake, speech failed, the GPU worker is lost, or the service stops.
A dialect (speech_websocket.py, nari_websocket.py, elevenlabs_websocket.py) reads and writes the messages.
"""

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, ClassVar, Final

import msgspec
import structlog
from litestar import WebSocket
from litestar.datastructures import State

from server.engine import EngineClient
from server.http.auth import admit_socket, caller_of, keyring_of, subprotocol_for
from server.http.errors import ApiError, internal_error
from server.http.json_socket import CLOSE_S, GOING_AWAY, NORMAL, POLICY, JsonSocket, SocketClosedError, close_code
from server.http.open_sockets import OpenSockets
from server.http.request_scope import SOCKET_ERROR, printable_path, request_id_of
from server.routes.live_speech import Utterance, UtteranceQueue
from server.routes.speech_start import SpeechPlan, SpeechStarter
from shared.settings import Settings

CONFIGURE_S: Final = 10.0
"""How long a client may take to say who it is and what it wants."""

IDLE_S: Final = 30.0
"""How long a socket that has nothing to say may be silent; a ping is a sign of life."""

MAX_TEXTS: Final = 16
"""How many times TTS_MAX_INPUT_CHARS the texts of one socket may have that are not spoken yet."""

MAX_MISTAKES: Final = 32
"""Messages that cannot be understood until the socket is closed."""

log = structlog.get_logger(__name__)


class SpeechSocket(ABC):
    """The socket of one client. `run` returns when it is closed; nothing of it is left then."""

    dialect: ClassVar[str]

    def __init__(self, websocket: WebSocket[Any, Any, Any], state: State) -> None:
        self.settings: Settings = state.settings
        self.request_id = request_id_of(websocket.scope)
        self.configured = False
        self.idle_s = IDLE_S
        self._websocket = websocket
        self._state = state
        self._engine: EngineClient = state.engine
        self._open_sockets: OpenSockets = state.open_sockets
        self._socket = JsonSocket(websocket, send_timeout_s=self.settings.stall_timeout_s)
        self._key = ""
        self._admitted = False
        self._queues: list[UtteranceQueue] = []
        self._mistakes = 0
        self._draining = False
        self._active_at = time.monotonic()
        self._end: asyncio.Future[tuple[int, str, ApiError | None]] = asyncio.get_running_loop().create_future()

    # --- what a dialect does -----------------------------------------------------------------------------------------

    @abstractmethod
    async def on_message(self, message: str) -> None:
        """Take a message. An ApiError is sent to the client; before the configuration it ends the socket."""

    @abstractmethod
    def error_message(self, error: ApiError) -> Any:
        """The message for an error."""

    def last_messages(self, error: ApiError) -> list[Any]:
        """The messages for the error that ends the socket."""
        return [self.error_message(error)]

    async def on_open(self) -> None:  # noqa: B027 - most dialects let the client begin
        """Greet the client."""

    def on_queue_empty(self) -> None:  # noqa: B027 - most dialects wait for more
        """A queue has said everything."""

    # --- what a dialect uses -----------------------------------------------------------------------------------------

    def admit(self, key: str | None = None) -> None:
        """Check the client's key, which the first message may have. Raises ApiError (`invalid_api_key`)."""
        self._key = self._key or key or ""
        self._admitted = False
        self._admitted = admit_socket(self._websocket, self._key)
        if not self._admitted:
            message = "This server needs an API key: in a header, a subprotocol, or the first message."
            raise ApiError("invalid_api_key", message)

    def starter(self) -> SpeechStarter:
        """The starter of this client's requests, by the settings and the limits of now."""
        self.settings = self._state.settings
        return SpeechStarter(
            engine=self._engine,
            settings=self.settings,
            decoder_pool=self._state.decoder_pool,
            caller=caller_of(self.settings, self._websocket, self._key),
        )

    def renewed(self, plan: SpeechPlan) -> SpeechPlan:
        """The plan by the settings and the limits of now: a reload may have changed them since the configuration."""
        return replace(plan, starter=self.starter())

    def new_queue(self, speak: Callable[[Utterance], Awaitable[None]]) -> UtteranceQueue:
        """A queue of utterances; the socket ends if one of them fails."""
        queue = UtteranceQueue(speak, self.fail, self._on_queue_empty, self.refusal)
        self._queues.append(queue)
        return queue

    def drop_queue(self, queue: UtteranceQueue) -> None:
        """Forget a queue that has nothing more to say."""
        self._queues.remove(queue)

    async def send(self, message: bytes | msgspec.Struct | dict[str, Any]) -> None:
        """Send a message; see `JsonSocket.send`."""
        await self._socket.send(message)
        self._active_at = time.monotonic()

    def close(self) -> None:
        """End the socket normally: nothing is left to be said."""
        self._finish(NORMAL, "")

    def append(self, utterance: Utterance, text: str) -> None:
        """Add text to an utterance. If it cannot be added the socket ends: the speech would lack a part."""
        limit = MAX_TEXTS * self.settings.max_input_chars
        if sum(queue.characters for queue in self._queues) + len(text) > limit:
            self.fail(self.refusal(f"{limit} characters wait to be spoken, as many as one socket may have."))
            return
        try:
            utterance.append(text)
        except ApiError as error:
            self.fail(error)

    def refusal(self, message: str) -> ApiError:
        """The error for a text too many in this socket, which is counted."""
        self._state.limit_hits["texts_of_socket"] += 1
        return ApiError("queue_full", message)

    def end_text(self, utterance: Utterance) -> None:
        """End the text of an utterance. If its rest cannot be spoken the socket ends."""
        try:
            utterance.end()
        except ApiError as error:
            self.fail(error)

    def fail(self, error: Exception) -> None:
        """End the socket with an error."""
        if isinstance(error, SocketClosedError):
            self._finish(GOING_AWAY, "")
            return
        if not isinstance(error, ApiError):
            log.error("socket_crashed", request_id=self.request_id, exc_info=error)
            error = internal_error()
        self._finish(close_code(error), error.message, error)

    @property
    def ended(self) -> bool:
        """True once there is a reason for its end."""
        return self._end.done()

    @property
    def busy(self) -> bool:
        """True while something is to be said whose text is complete."""
        return any(queue.busy for queue in self._queues)

    # --- the end of the service --------------------------------------------------------------------------------------

    def drain(self) -> None:
        """End when everything is said, also what is still being written."""
        self._draining = True
        if not any(queue.running for queue in self._queues):
            self._finish(GOING_AWAY, "the service is shutting down")

    def cut_off(self) -> None:
        """End now."""
        self.fail(ApiError("shutting_down", "The service is shutting down."))

    # --- the life of the socket --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the socket until it is closed."""
        try:
            self._admitted = admit_socket(self._websocket)
        except ApiError as error:
            self._websocket.scope["state"][SOCKET_ERROR] = error
            return
        await self._websocket.accept(subprotocols=subprotocol_for(list(self._websocket.scope["subprotocols"])))
        self._open_sockets.add(self)
        lost = asyncio.create_task(self._watch_worker())
        try:
            await self._serve()
        except SocketClosedError:
            self._finish(GOING_AWAY, "")
        except Exception as error:  # noqa: BLE001 - the client must get its close
            self.fail(error)
        finally:
            lost.cancel()
            self._finish(GOING_AWAY, "the service is shutting down")
            for queue in list(self._queues):
                await queue.cancel()
            await self._send_close()
            self._open_sockets.discard(self)

    async def _serve(self) -> None:
        await self.on_open()
        receiving: asyncio.Task[str] | None = None
        try:
            while not self._end.done():
                # The task outlives a timeout: to cancel it could lose a message.
                receiving = receiving or asyncio.create_task(self._socket.receive())
                waited: set[asyncio.Future[Any]] = {receiving, self._end}
                await asyncio.wait(waited, timeout=self._receive_timeout_s(), return_when=asyncio.FIRST_COMPLETED)
                if receiving.done():
                    message, receiving = receiving, None
                    self._active_at = time.monotonic()
                    await self._handle(message)
                elif self._receive_timeout_s() == 0 and not self._end.done():
                    await self._on_receive_timeout()
        finally:
            if receiving is not None:
                receiving.cancel()
                with contextlib.suppress(asyncio.CancelledError, SocketClosedError, ApiError):
                    await receiving

    async def _handle(self, message: "asyncio.Task[str]") -> None:
        try:
            text = message.result()
            if self._admitted and keyring_of(self._websocket).guards_speech:
                self.admit()  # a socket may outlive its key
            await self.on_message(text)
        except ApiError as error:
            self._mistakes += 1
            fatal = close_code(error) != POLICY or not self._admitted or self._mistakes > MAX_MISTAKES
            if fatal or not self.configured:
                self.fail(error)
            else:
                await self.send(self.error_message(error))

    def _receive_timeout_s(self) -> float:
        """How long the next message may take from now on; while something is being said, when to ask again."""
        if self.busy:
            return self.idle_s
        limit_s = self.idle_s if self.configured else CONFIGURE_S
        return max(0.0, self._active_at + limit_s - time.monotonic())

    async def _on_receive_timeout(self) -> None:
        if not self.configured:
            self.fail(ApiError("request_timeout", f"No configuration came within {CONFIGURE_S:.0f} s."))
            return
        silent_s = await self._socket.silent_s()
        if silent_s < self.idle_s:
            self._active_at = time.monotonic() - silent_s
        else:
            self.fail(ApiError("request_timeout", f"No message came within {self.idle_s:.0f} s."))

    def _on_queue_empty(self) -> None:
        self._active_at = time.monotonic()
        self.on_queue_empty()
        if self._draining:
            self.drain()

    async def _watch_worker(self) -> None:
        self.fail(await self._engine.worker_loss())

    def _finish(self, code: int, reason: str, error: ApiError | None = None) -> None:
        """The first reason counts."""
        if not self._end.done():
            self._end.set_result((code, reason, error))

    async def _send_close(self) -> None:
        code, reason, error = self._end.result()
        if error is not None:
            with contextlib.suppress(TimeoutError, SocketClosedError, ApiError):
                async with asyncio.timeout(CLOSE_S):
                    for message in self.last_messages(error):
                        await self.send(message)
        await self._socket.close(code, reason)
        log.info(
            "socket_closed",
            request_id=self.request_id,
            dialect=self.dialect,
            path=printable_path(self._websocket.scope),
            code=code,
            error=error.code if error else None,
        )
