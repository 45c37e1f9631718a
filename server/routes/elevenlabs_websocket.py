"""ElevenLabs' WebSockets: /v1/text-to-speech/{voice_id}/stream-input, and multi-stream-input for several texts.

A text comes in pieces; its audio leaves as base64 in JSON, one stream of the output format for each context.
The generation begins with the first piece, or when as many characters are there as the first number of
`chunk_length_schedule` says; a flush, the end and `try_trigger_generation` begin it at once. From then on each piece is
spoken when it comes, so further numbers have no effect. `alignment` is null: no model knows the times of characters.
"""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgspec
from litestar import WebSocket, websocket
from litestar.datastructures import State
from msgspec import Meta

from server.audio import Encoder
from server.engine import Chunk
from server.http.errors import ApiError
from server.http.json_bodies import JsonDecoder
from server.http.json_socket import close_code
from server.http.leniency import VERBATIM
from server.routes.elevenlabs import VoiceId, VoiceSettings, best_effort, pauses_of, speech_fields, without_begun_pause
from server.routes.live_speech import PartStart, Utterance
from server.routes.speech_socket import IDLE_S, SpeechSocket
from server.routes.speech_start import SpeechPlan
from server.schemas import Name

MAX_CONTEXTS: Final = 16
"""Contexts of one socket that are open or still speak."""

_LONGEST_IDLE_S: Final = 180
_DEFAULT_CONTEXT: Final = "default"


class StreamInputQuery(msgspec.Struct, frozen=True, kw_only=True):
    """The query of both paths; what is not listed has no effect."""

    model_id: Name | None = None
    language_code: Annotated[str, Meta(max_length=64)] | None = None
    output_format: Annotated[str, Meta(max_length=40)] | None = None
    seed: Annotated[int, Meta(ge=0, le=4_294_967_295)] | None = None
    auto_mode: bool | None = None
    inactivity_timeout: Annotated[int, Meta(ge=1, le=_LONGEST_IDLE_S)] | None = None


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The lengths of text at which a generation begins."""

    chunk_length_schedule: Annotated[list[float], Meta(max_length=100)] | None = None


class InputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that messages of both paths may have."""

    voice_settings: VoiceSettings | None = None
    generation_config: GenerationConfig | None = None
    try_trigger_generation: bool | None = None
    flush: bool | None = None
    xi_api_key: Annotated[str, Meta(max_length=1000)] | None = None
    authorization: Annotated[str, Meta(max_length=1000)] | None = None


class StreamInput(InputMessage, frozen=True, kw_only=True):
    """A message of stream-input; an empty text ends it."""

    text: str


class ContextInput(InputMessage, frozen=True, kw_only=True):
    """A message of multi-stream-input; an empty text is a sign of life."""

    text: Annotated[str, Meta(extra=VERBATIM)] | None = None
    context_id: Annotated[str, Meta(max_length=200)] | None = None
    close_context: bool | None = None
    close_socket: bool | None = None


class StreamOutput(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Audio of a context, or its end."""

    audio: bytes | None = None
    is_final: bool | None = None
    alignment: None = None
    normalized_alignment: None = None
    context_id: str | msgspec.UnsetType = msgspec.UNSET


class StreamError(msgspec.Struct, frozen=True, kw_only=True):
    """Why the socket is closed; `code` is that of the close."""

    message: str
    error: str
    code: int


M = TypeVar("M", bound=InputMessage)

_STREAM_INPUT: Final = JsonDecoder(StreamInput, {})
_CONTEXT_INPUT: Final = JsonDecoder(ContextInput, {"contextId": "context_id"})
_QUERY: Final = JsonDecoder(StreamInputQuery, {})


@websocket("/v1/text-to-speech/{voice_id:str}/stream-input")
async def stream_input(socket: WebSocket[Any, Any, Any], state: State, voice_id: VoiceId) -> None:
    """Speak one text that comes in pieces."""
    await _SingleSocket(socket, state, voice_id).run()


@websocket("/v1/text-to-speech/{voice_id:str}/multi-stream-input")
async def multi_stream_input(socket: WebSocket[Any, Any, Any], state: State, voice_id: VoiceId) -> None:
    """Speak texts that come in pieces, several at a time."""
    await _MultiSocket(socket, state, voice_id).run()


class _Context:
    """One text and its audio. `name` stands in the answers of a socket with several."""

    def __init__(self, socket: "_ElevenLabsSocket", plan: SpeechPlan, first: InputMessage, name: str | None) -> None:
        schedule = first.generation_config.chunk_length_schedule if first.generation_config else None
        self._threshold = schedule[0] if schedule and not socket.query.auto_mode else 0
        self._socket = socket
        self._plan = plan
        self._name = name
        self._queue = socket.new_queue(self._speak)
        self._encoder: Encoder | None = None
        self._held = ""
        """Text that waits until there is enough of it to begin."""
        self._open: Utterance | None = None
        self._last: Utterance | None = None
        """The one behind which the context is final."""

    def take(self, text: str, message: InputMessage) -> None:
        """Take a piece of text. Raises ApiError."""
        if not text and not message.flush:
            return  # a sign of life
        if self._last is not None:
            raise ApiError("invalid_value", "text: the context is closed.", param="text")
        self._held += text
        if len(self._held) > self._socket.settings.max_input_chars:
            self._socket.append(self._open or self._add(), self._held)  # too long: the socket ends
            return
        self._held = pauses_of(self._held)
        now = message.try_trigger_generation or message.flush or self._open is not None
        text = self._held if message.flush else without_begun_pause(self._held)
        if text.strip() and (now or len(text) >= self._threshold):
            if self._open is None:
                self._open = self._add()
            self._socket.append(self._open, text)
            self._held = self._held[len(text) :]
        elif not self._held.strip():
            self._held = self._held[:1]  # a client may send a space every few seconds, to keep the socket open
        if message.flush and self._open is not None:
            self._socket.end_text(self._open)
            self._open = None

    def close(self) -> None:
        """The text is complete."""
        if self._last is None:
            self.take("", InputMessage(flush=True))
            self._last = self._add()
            self._socket.end_text(self._last)

    def _add(self) -> Utterance:
        utterance = Utterance(self._socket.renewed(self._plan), self._socket.next_request_id())
        self._queue.add(utterance)
        return utterance

    async def _speak(self, utterance: Utterance) -> None:
        async with aclosing(utterance.speak()) as spoken:
            async for part in spoken:
                match part:
                    case PartStart(_, started) if self._encoder is None:
                        self._encoder = started.encoder(streaming=True)
                    case Chunk() if self._encoder is not None:
                        await self._send(self._encoder.feed(part.pcm, part.rate))
        if utterance is self._last:
            await self._send(self._encoder.finish() if self._encoder else b"")
            await self._socket.send(self._output(is_final=True))
            self._socket.drop_queue(self._queue)
            self._socket.on_final(self._name)

    async def _send(self, audio: bytes) -> None:
        if audio:
            await self._socket.send(self._output(audio=audio))

    def _output(self, *, audio: bytes | None = None, is_final: bool | None = None) -> StreamOutput:
        name = msgspec.UNSET if self._name is None else self._name
        return StreamOutput(audio=audio, is_final=is_final, context_id=name)


class _ElevenLabsSocket(SpeechSocket):
    def __init__(self, socket: WebSocket[Any, Any, Any], state: State, voice_id: str) -> None:
        super().__init__(socket, state)
        self.query = StreamInputQuery()
        self._given = dict(socket.query_params.items())
        self._voice_id = voice_id
        self._requests = 0

    async def on_open(self) -> None:
        """Read the query: its mistakes are errors that the client can read."""
        self.query = _QUERY.decode_form(self._given)
        self.idle_s = float(self.query.inactivity_timeout or IDLE_S)

    def error_message(self, error: ApiError) -> StreamError:
        """The message for an error."""
        return StreamError(message=error.message, error=error.code, code=close_code(error))

    def next_request_id(self) -> str:
        """The request id of the next utterance."""
        self._requests += 1
        return f"{self.request_id}-{self._requests - 1}"

    def on_final(self, context: str | None) -> None:
        """All audio of a context was sent."""

    async def new_context(self, first: InputMessage, name: str | None = None) -> _Context:
        """A context that speaks as its first message says. Raises ApiError."""
        fields = speech_fields(
            " ",
            self._voice_id,
            self.query.output_format,
            settings=self.settings,
            model_id=self.query.model_id,
            language_code=self.query.language_code,
            speed=first.voice_settings.speed if first.voice_settings else None,
            seed=self.query.seed,
        )
        plan, _ = await best_effort(fields, self.starter().plan)
        return _Context(self, plan, first, name)

    def read(self, decoder: JsonDecoder[M], message: str) -> M | None:
        """The message of an admitted client. Raises ApiError: its key is wrong.

        None if it cannot be read. The socket ends then: the speech would lack its text.
        """
        try:
            data = decoder.decode(message.encode(), "")
        except ApiError as error:
            self.fail(error)
            return None
        self.admit(data.xi_api_key or (data.authorization or "").removeprefix("Bearer "))
        return data


class _SingleSocket(_ElevenLabsSocket):
    dialect: ClassVar[str] = "stream-input"

    def __init__(self, socket: WebSocket[Any, Any, Any], state: State, voice_id: str) -> None:
        super().__init__(socket, state, voice_id)
        self._context: _Context | None = None

    async def on_message(self, message: str) -> None:
        """Take a message."""
        data = self.read(_STREAM_INPUT, message)
        if data is None:
            return
        if self._context is None:
            self._context = await self.new_context(data)
            self.configured = True
        self._context.take(data.text, data)
        if not data.text:
            self._context.close()

    def on_final(self, context: str | None) -> None:
        """Close: the socket has one text."""
        _ = context
        self.close()


class _MultiSocket(_ElevenLabsSocket):
    dialect: ClassVar[str] = "multi-stream-input"

    def __init__(self, socket: WebSocket[Any, Any, Any], state: State, voice_id: str) -> None:
        super().__init__(socket, state, voice_id)
        self._contexts: dict[str, _Context] = {}
        self._leaving = False

    async def on_message(self, message: str) -> None:
        """Take a message."""
        data = self.read(_CONTEXT_INPUT, message)
        if data is None:
            return
        self.configured = True
        await self._take(data)
        if data.close_socket:
            self._leave()

    async def _take(self, data: ContextInput) -> None:
        """Take its text. A message without text opens no context: it may be there to keep the socket open."""
        name = data.context_id or _DEFAULT_CONTEXT
        context = self._contexts.get(name)
        if context is None:
            is_last = data.close_context or data.close_socket
            if not data.text or (is_last and not data.text.strip()):
                return
            context = self._contexts[name] = await self._new(data, name)
        context.take(data.text or "", data)
        if data.close_context:
            context.close()

    async def _new(self, first: InputMessage, name: str) -> _Context:
        if self._leaving:
            raise ApiError("invalid_value", "close_socket: nothing may follow it.", param="close_socket")
        if len(self._contexts) >= MAX_CONTEXTS:
            raise self.refusal(f"{MAX_CONTEXTS} contexts are open, as many as one socket may have.")
        return await self.new_context(first, name)

    def _leave(self) -> None:
        self._leaving = True
        for context in self._contexts.values():
            context.close()
        if not self._contexts:
            self.close()

    def on_final(self, context: str | None) -> None:
        """Forget the context; its name may be used again."""
        self._contexts.pop(context or _DEFAULT_CONTEXT, None)
        if self._leaving and not self._contexts:
            self.close()
