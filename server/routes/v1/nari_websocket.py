"""WS /v1/audio/speech/ws: the subprotocol nari.speech.v1. One socket speaks one text, as pcm of 24 kHz."""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from litestar import WebSocket, websocket
from litestar.datastructures import State
from msgspec import Meta

from server.audio import Encoder
from server.engine import Chunk
from server.http.errors import ApiError, ErrorBody, envelope
from server.http.json_bodies import JsonDecoder
from server.http.leniency import VERBATIM
from server.routes.live_speech import PartEnd, PartStart, Utterance
from server.routes.speech_socket import SpeechSocket
from server.schemas import ALIASES, SpeechRequest
from shared.pcm import SAMPLE_RATE

PROTOCOL: Final = "nari.speech.v1"


class AudioEncoding(msgspec.Struct, frozen=True, kw_only=True):
    """The encoding of the binary frames."""

    encoding: str = "pcm_s16le"
    sample_rate: int = SAMPLE_RATE
    channels: int = 1


class SessionCreated(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="session.created"):
    """The socket is open, and waits for request.start."""

    protocol: str = PROTOCOL
    audio: AudioEncoding = AudioEncoding()


class RequestStart(SpeechRequest, frozen=True, kw_only=True):
    """How to speak: the fields of a request for speech without its text. The audio is pcm."""

    input: str = ""
    response_format: Annotated[
        Literal["pcm", "pcm16", "pcm_s16le"] | None, Meta(description="Each of these names is pcm of 24 kHz.")
    ] = None  # type: ignore[assignment] # the format has more names here than elsewhere
    api_key: Annotated[str, Meta(max_length=1000)] | None = None


class RequestConfigured(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="request.configured"):
    """The text may come."""

    request_id: str


class InputTextAck(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input_text.ack"):
    """A message of the input was taken."""

    event: str
    sequence: int
    request_id: str


class ResponseStarted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="response.started"):
    """Binary frames follow."""

    request_id: str
    audio: AudioEncoding = AudioEncoding()


class ResponseDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="response.done"):
    """All was sent, or the response was cancelled; the socket is closed."""

    request_id: str
    stop_reason: str
    audio_chunks: int


class ResponseError(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """Why the socket is closed."""

    request_id: str
    error: ErrorBody


class _Event(msgspec.Struct, kw_only=True):
    type: str
    sequence: Annotated[int, Meta(ge=0)] | None = None
    text: Annotated[str, Meta(min_length=1, extra=VERBATIM)] | None = None


_START: Final = JsonDecoder(RequestStart, ALIASES | {"instruction": "instructions"})
_EVENT: Final = JsonDecoder(_Event, {})


@websocket("/v1/audio/speech/ws")
async def speak_nari(socket: WebSocket[Any, Any, Any], state: State) -> None:
    """Speak one text that comes in pieces."""
    await _NariSocket(socket, state).run()


class _NariSocket(SpeechSocket):
    dialect: ClassVar[str] = PROTOCOL

    def __init__(self, socket: WebSocket[Any, Any, Any], state: State) -> None:
        super().__init__(socket, state)
        self._offered = list(socket.scope["subprotocols"])
        self._queue = self.new_queue(self._speak)
        self._utterance: Utterance | None = None
        self._next_sequence = 0
        self._chunks = 0

    def error_message(self, error: ApiError) -> ResponseError:
        """The message for an error."""
        return ResponseError(request_id=self.request_id, error=envelope(error).error)

    async def on_open(self) -> None:
        """Greet a client that speaks the protocol."""
        if PROTOCOL not in self._offered:
            raise ApiError("invalid_value", f"The client must offer the subprotocol {PROTOCOL}.")
        await self.send(SessionCreated())

    async def on_message(self, message: str) -> None:
        """Take an event. Every mistake ends the socket, as the protocol has it."""
        try:
            await self._take_event(message.encode())
        except ApiError as error:
            self.fail(error)

    async def _take_event(self, body: bytes) -> None:
        event = _EVENT.decode(body, "")
        utterance = self._utterance
        if event.type == "request.start":
            await self._configure(body)
        elif utterance is None:
            raise ApiError("invalid_value", "type: the first message must be request.start.", param="type")
        elif event.type == "response.cancel":
            await self._queue.cancel()
            await self._finish_response("cancelled")
        elif event.type in {"input_text.append", "input_text.end"}:
            await self._take_text(utterance, event)
        else:
            raise ApiError("invalid_value", "type: there is no such event.", param="type")

    async def _configure(self, body: bytes) -> None:
        if self._utterance is not None:
            raise ApiError("invalid_value", "request.start: the request is under way.")
        data = _START.decode(body, "")
        self.admit(data.api_key)
        if data.sample_rate not in {None, 0, SAMPLE_RATE}:
            raise ApiError("invalid_value", "sample_rate: this protocol sends pcm of 24 kHz.", param="sample_rate")
        plan = await self.starter().plan(
            msgspec.structs.replace(data, api_key=None, response_format="pcm", timestamps=None, store=None)
        )
        self._utterance = Utterance(plan, self.request_id)
        self.configured = True
        await self.send(RequestConfigured(request_id=self.request_id))

    async def _take_text(self, utterance: Utterance, event: _Event) -> None:
        if event.sequence != self._next_sequence:
            raise ApiError("invalid_value", f"sequence: must be {self._next_sequence}.", param="sequence")
        if utterance.ended:
            raise ApiError("invalid_value", "type: the text has ended.", param="type")
        if event.sequence == 0:
            self._queue.add(utterance)
        self._next_sequence += 1
        if event.type == "input_text.end":
            self.end_text(utterance)
        elif event.text is None:
            raise ApiError("invalid_value", "text is missing.", param="text")
        else:
            utterance.append(event.text)
        await self.send(InputTextAck(event=event.type, sequence=event.sequence, request_id=self.request_id))

    async def _speak(self, utterance: Utterance) -> None:
        encoder: Encoder | None = None
        reason = "empty"
        async with aclosing(utterance.speak()) as spoken:
            async for part in spoken:
                match part:
                    case PartStart(_, started) if encoder is None:
                        encoder = started.encoder(streaming=True)
                        await self.send(ResponseStarted(request_id=self.request_id))
                    case Chunk() if encoder is not None:
                        await self._send_audio(encoder.feed(part.pcm, part.rate))
                    case PartEnd(finished):
                        reason = finished.reason
        await self._send_audio(encoder.finish() if encoder else b"")
        await self._finish_response(reason)

    async def _send_audio(self, data: bytes) -> None:
        if data:
            await self.send(data)
            self._chunks += 1

    async def _finish_response(self, reason: str) -> None:
        await self.send(ResponseDone(request_id=self.request_id, stop_reason=reason, audio_chunks=self._chunks))
        self.close()
