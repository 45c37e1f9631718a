"""WS /v1/audio/speech/stream: text in as it is written, audio out as it is made.

The dialect is that of vLLM-Omni and SGLang-Omni.

The client sends session.config, then input.text any number of times; input.commit or input.done ends an utterance, and
the next one may follow. Each part of an utterance is answered by audio.start, binary frames and audio.done.
"""

from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from litestar import WebSocket, websocket
from litestar.datastructures import State
from msgspec import Meta

from server.audio import Encoder
from server.engine import Chunk
from server.http.errors import ApiError
from server.http.json_bodies import JsonDecoder
from server.routes.live_speech import PartEnd, PartStart, SplitGranularity, Utterance
from server.routes.speech_response import MAX_WHOLE_BYTES
from server.routes.speech_socket import SpeechSocket
from server.routes.speech_start import SpeechPlan
from server.schemas import ALIASES, SpeechRequest, SpeechUsage, usage_of
from shared.protocol import Finished, FinishReason, speech_id_of
from shared.redaction import redact

_CHANNELS: Final = 1
_KNOWN: Final = "session.config, input.text, input.commit, input.done, input.cancel, session.close"
_NO_EFFECT: Final = ("timestamps", "store")
"""Fields of a request that have no effect here."""


class SessionConfig(SpeechRequest, frozen=True, kw_only=True):
    """How to speak: the fields of a request for speech without its text. It holds until the next session.config.

    `api_key` is for pages, which can send no header.
    """

    input: str = ""
    stream_audio: Annotated[
        bool | None, Meta(description="false: one frame with the whole audio of each part. By default, as it is made.")
    ] = None
    split_granularity: Annotated[
        SplitGranularity | None, Meta(description="sentence or clause: a request and a file of audio for each of them.")
    ] = None
    api_key: Annotated[str, Meta(max_length=1000)] | None = None


class SessionConfigured(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="session.configured"):
    """The configuration holds. `ignored` are its fields that have no effect."""

    session_id: str
    model: str
    voice: str
    response_format: str
    sample_rate: int
    stream_audio: bool
    split_granularity: SplitGranularity
    ignored: list[str]


class AudioStart(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="audio.start"):
    """Binary frames of one part of an utterance follow, up to its audio.done."""

    id: str
    utterance_index: int
    sentence_index: int
    sentence_text: str
    format: str
    sample_rate: int
    channels: int = _CHANNELS


class AudioDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="audio.done"):
    """The part is complete, unless `error` is true or its `finish_reason` is cancelled."""

    id: str
    utterance_index: int
    sentence_index: int
    total_bytes: int
    finish_reason: FinishReason | Literal["cancelled"] | None
    usage: SpeechUsage | None
    error: bool = False


class InputCommitted(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input.committed"):
    """Everything of the utterance that input.commit has ended was sent."""

    session_id: str
    utterance_index: int
    segment_index: int
    segment_sentences: int
    total_sentences: int


class SessionDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="session.done"):
    """Everything of the utterance that input.done has ended was sent. The socket is open for the next one."""

    session_id: str
    utterance_index: int
    total_sentences: int


class InputCancelled(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="input.cancelled"):
    """Nothing of what was sent before input.cancel is spoken any more."""

    session_id: str
    utterance_index: int


class SocketError(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """An error. `action` is the type of the message at fault, "" if none is."""

    message: str
    code: str
    param: str | None
    action: str


class _Typed(msgspec.Struct):
    type: Annotated[str, Meta(max_length=64)]
    """An error repeats it."""


class _InputText(msgspec.Struct, kw_only=True):
    text: str


class _Nested(msgspec.Struct):
    session: msgspec.Raw = msgspec.Raw()


CONFIG: Final = JsonDecoder(SessionConfig, ALIASES)
_TEXT: Final = JsonDecoder(_InputText, {})
_TYPE: Final = JsonDecoder(_Typed, {})
_NESTED: Final = JsonDecoder(_Nested, {})


@websocket("/v1/audio/speech/stream")
async def stream_speech(socket: WebSocket[Any, Any, Any], state: State) -> None:
    """Speak what is written into the socket."""
    await _StreamSocket(socket, state).run()


class _Numbered(Utterance):
    """An utterance with its number, and the message that has ended it."""

    def __init__(self, plan: SpeechPlan, request_id: str, config: SessionConfig, index: int) -> None:
        super().__init__(plan, request_id, config.split_granularity or "none")
        self.index = index
        self.streams = config.stream_audio is not False
        self.ended_by = ""


class _StreamSocket(SpeechSocket):
    dialect: ClassVar[str] = "stream"

    def __init__(self, socket: WebSocket[Any, Any, Any], state: State) -> None:
        super().__init__(socket, state)
        self._plan: SpeechPlan | None = None
        self._config = SessionConfig()
        self._queue = self.new_queue(self._speak)
        self._open: _Numbered | None = None
        self._next_index = 0
        self._total_sentences = 0
        self._segments = 0
        self._leaving = False
        self._action = ""
        self._fatal_action = ""
        """The action of the error that ends the socket."""
        self._part: AudioDone | None = None
        """The audio.done of the part under way, if that ended now."""

    def error_message(self, error: ApiError) -> SocketError:
        """The message for an error of the message that was taken last; a later error is not that one's."""
        action, self._action = self._action, ""
        return SocketError(message=error.message, code=error.code, param=error.param, action=action)

    def last_messages(self, error: ApiError) -> list[Any]:
        """The error, and the end of the part that it has cut off."""
        cut_off = [] if self._part is None else [msgspec.structs.replace(self._part, error=True)]
        return [msgspec.structs.replace(self.error_message(error), action=self._fatal_action), *cut_off]

    def fail(self, error: Exception) -> None:
        """End the socket with an error: by the message that is being taken, if there is one."""
        if not self.ended:
            self._fatal_action = self._action
        super().fail(error)

    async def on_message(self, message: str) -> None:
        """Take a message."""
        body = message.encode()
        self._action = ""
        kind = _TYPE.decode(body, "").type
        self._action = redact(kind)
        if kind == "session.config":
            await self._configure(body)
        elif self._plan is None:
            raise ApiError("invalid_value", "type: the first message must be session.config.", param="type")
        elif self._leaving:
            raise ApiError("invalid_value", "type: nothing may follow session.close.", param="type")
        else:
            await self._take_input(self._plan, kind, body)
        self._action = ""

    async def _take_input(self, plan: SpeechPlan, kind: str, body: bytes) -> None:
        match kind:
            case "input.text":
                self._append(plan, body)
            case "input.commit" | "input.done":
                self._commit(plan, kind)
            case "input.cancel":
                await self._cancel()
            case "session.close":
                self._leave(plan)
            case _:
                raise ApiError("invalid_value", f"type: there is no such message; there are: {_KNOWN}.", param="type")

    def _append(self, plan: SpeechPlan, body: bytes) -> None:
        try:
            text = _TEXT.decode(body, "").text
        except ApiError as error:
            self.fail(error)  # the speech would lack a part
        else:
            self.append(self._open or self._begin(plan), text)

    def _leave(self, plan: SpeechPlan) -> None:
        if self._open is not None:
            self._commit(plan, "session.close")
        self._leaving = True
        if not self._queue.busy:
            self.close()

    async def _configure(self, body: bytes) -> None:
        if self._open is not None or self._queue.busy:
            raise ApiError("invalid_value", "session.config: an utterance is under way; end or cancel it first.")
        nested = _NESTED.fields(body, "").get("session")
        config = CONFIG.decode(bytes(nested) if nested else body, "")
        self.admit(config.api_key or CONFIG.decode(body, "").api_key)
        given = [name for name in _NO_EFFECT if getattr(config, name)]
        config = msgspec.structs.replace(config, api_key=None, timestamps=None, store=None)
        plan = await self.starter().plan(config)
        # The recording is decoded: its text is not needed any more.
        self._config = config = msgspec.structs.replace(config, ref_audio=None)
        self._plan = plan
        self.configured = True
        await self.send(
            SessionConfigured(
                session_id=self.request_id,
                model=plan.resolved.model.id,
                voice=plan.resolved.voice,
                response_format=plan.audio_format,
                sample_rate=plan.sample_rate,
                stream_audio=config.stream_audio is not False,
                split_granularity=config.split_granularity or "none",
                ignored=[*plan.resolved.ignored, *given],
            )
        )

    def _begin(self, plan: SpeechPlan) -> "_Numbered":
        plan = self.renewed(plan)
        utterance = _Numbered(plan, f"{self.request_id}-{self._next_index}", self._config, self._next_index)
        self._queue.add(utterance)
        self._open = utterance
        self._next_index += 1
        return utterance

    def _commit(self, plan: SpeechPlan, kind: str) -> None:
        utterance = self._open or self._begin(plan)
        utterance.ended_by = kind
        self.end_text(utterance)
        self._open = None

    async def _cancel(self) -> None:
        await self._queue.cancel()
        self._open = None
        if self._part is not None:
            await self.send(msgspec.structs.replace(self._part, finish_reason="cancelled"))
            self._part = None
        await self.send(InputCancelled(session_id=self.request_id, utterance_index=self._next_index - 1))

    def on_queue_empty(self) -> None:
        """Close if the client has said that nothing more comes."""
        if self._leaving:
            self.close()

    async def _speak(self, utterance: Utterance) -> None:
        assert isinstance(utterance, _Numbered)  # noqa: S101 - no other one is added
        sentences = 0
        encoder: Encoder | None = None
        pcm_bytes = 0
        async with aclosing(utterance.speak()) as spoken:
            async for part in spoken:
                match part:
                    case PartStart(text, started):
                        encoder = started.encoder(streaming=utterance.streams)
                        pcm_bytes = 0
                        start = AudioStart(
                            id=speech_id_of(started.speech.id),
                            utterance_index=utterance.index,
                            sentence_index=sentences,
                            sentence_text=text,
                            format=started.audio_format,
                            sample_rate=started.sample_rate,
                        )
                        await self.send(start)
                        self._part = _done(start)
                    case Chunk():
                        pcm_bytes += len(part.pcm)
                        if not utterance.streams and pcm_bytes > MAX_WHOLE_BYTES:
                            message = "stream_audio: too much speech for one frame; stream it."
                            raise ApiError("invalid_value", message, param="stream_audio")
                        await self._send_audio(encoder.feed(part.pcm, part.rate) if encoder else b"")
                    case PartEnd(finished):
                        await self._send_audio(encoder.finish() if encoder else b"")
                        await self._send_done(finished)
                        sentences += 1
        self._total_sentences += sentences
        await self._send_end(utterance, sentences)

    async def _send_audio(self, data: bytes) -> None:
        if data and self._part is not None:
            await self.send(data)
            self._part = msgspec.structs.replace(self._part, total_bytes=self._part.total_bytes + len(data))

    async def _send_done(self, finished: Finished) -> None:
        if self._part is not None:
            usage = usage_of(finished.usage)
            await self.send(msgspec.structs.replace(self._part, finish_reason=finished.reason, usage=usage))
        self._part = None

    async def _send_end(self, utterance: _Numbered, sentences: int) -> None:
        if utterance.ended_by == "input.done":
            done = SessionDone(session_id=self.request_id, utterance_index=utterance.index, total_sentences=sentences)
            await self.send(done)
        elif utterance.ended_by == "input.commit":
            committed = InputCommitted(
                session_id=self.request_id,
                utterance_index=utterance.index,
                segment_index=self._segments,
                segment_sentences=sentences,
                total_sentences=self._total_sentences,
            )
            self._segments += 1
            await self.send(committed)


def _done(start: AudioStart) -> AudioDone:
    return AudioDone(
        id=start.id,
        utterance_index=start.utterance_index,
        sentence_index=start.sentence_index,
        total_bytes=0,
        finish_reason=None,
        usage=None,
    )
