"""From a checked body to speech under way: what every route that speaks does first."""

import asyncio
import functools
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from server.audio import CONTENT_TYPES, DecoderPool, Encoder, Format, Provenance, load_resampler
from server.captions import Captions
from server.engine import (
    INITIAL_CREDIT,
    EngineClient,
    Speech,
    cached_catalog,
    find_saved_voice,
    require_consent,
    silent_speech,
)
from server.http.auth import caller_of
from server.http.errors import ApiError
from server.http.keys import Caller
from server.http.request_scope import request_id_of
from server.http.request_traces import traceparent
from server.http.streaming import cancel_on_disconnect
from server.resolution import Resolved, check_input, resolve, sample_rate, saved_voice_name, unaliased
from server.schemas import SpeechRequest
from server.text import EVERY_LANGUAGE, InputFormat, PreparedSegment, Pronunciations, load_pronunciations, prepare
from shared.pcm import SAMPLE_RATE
from shared.protocol import SavedVoice, Segment, Speak, new_speak_id, request_id_in
from shared.settings import Settings
from shared.text import MAX_RESPELLED

_SHORT_INPUT: Final = 500
"""Characters of an input that may be prepared on the event loop: 10 ms at worst."""

_MILLISECONDS: Final = re.compile(r"[1-9][0-9]{0,7}")
"""More than a day at most."""


@dataclass(frozen=True, kw_only=True)
class StartedSpeech:
    """A request that the engine has, and how its audio is to be encoded. Abort `speech` if the rest is not wanted."""

    speech: Speech
    text: str
    timestamps: bool
    segments: list[PreparedSegment]
    resolved: Resolved
    audio_format: Format
    sample_rate: int
    speed: float
    provenance: Provenance | None

    @property
    def media_type(self) -> str:
        """The content type of the audio."""
        return CONTENT_TYPES[self.audio_format]

    def encoder(self, *, streaming: bool) -> Encoder:
        """A new encoder for the audio."""
        return Encoder(
            self.audio_format,
            speed=self.speed,
            sample_rate=self.sample_rate,
            streaming=streaming,
            provenance=self.provenance,
        )

    def captions(self) -> Captions | None:
        """The words of the speech, if its client wants them."""
        return Captions(self.text, self.segments, self.speed) if self.timestamps else None

    def ignoring(self, *fields: str) -> "StartedSpeech":
        """The same, with more fields that have no effect."""
        resolved = msgspec.structs.replace(self.resolved, ignored=(*self.resolved.ignored, *fields))
        return replace(self, resolved=resolved)


@dataclass(frozen=True, kw_only=True)
class SpeechPlan:
    """The plan of one client's speech: everything of a request but its text."""

    starter: "SpeechStarter"
    data: SpeechRequest
    resolved: Resolved
    audio_format: Format
    sample_rate: int
    reference: bytes | None

    @property
    def input_format(self) -> InputFormat:
        """The format in which its texts are read."""
        return self.data.input_format or self.starter.settings.input_format

    def pronunciations(self) -> list[Pronunciations]:
        """The tables of respelled words, an earlier one before a later one."""
        return self.starter.pronunciations(self.data, self.resolved)

    async def start(self, text: str, request_id: str) -> StartedSpeech:
        """Let the engine speak `text`. Raises ApiError."""
        segments = await self._prepare(text)
        speak = self._speak([segment.to_struct() for segment in segments], request_id)
        speakable = any(segment.text for segment in segments)
        engine = self.starter.engine
        speech = engine.speak(speak, self.reference) if speakable else silent_speech(speak, engine)
        return self._started(speech, text, segments)

    def start_open(self, text: str, request_id: str) -> StartedSpeech:
        """Let the engine speak `text`, which goes on with `Speech.append` until `Speech.end_text`. Raises ApiError.

        Nothing is prepared: a growing text is plain (server/text/growing.py).
        """
        speak = self._speak([Segment(text=text)], request_id)
        layout = False if self.resolved.model.sampling else None
        speak = msgspec.structs.replace(speak, open=True, non_streaming_mode=layout)
        return self._started(self.starter.engine.speak(speak, self.reference), text, [])

    def _started(self, speech: Speech, text: str, segments: list[PreparedSegment]) -> StartedSpeech:
        return StartedSpeech(
            speech=speech,
            text=text,
            timestamps=bool(self.data.timestamps),
            segments=segments,
            resolved=self.resolved,
            audio_format=self.audio_format,
            sample_rate=self.sample_rate,
            speed=self.data.speed or 1.0,
            provenance=self._provenance(speech.id) if self.starter.settings.provenance else None,
        )

    def _provenance(self, speak_id: str) -> Provenance:
        return Provenance(model=self.resolved.model.id, request_id=request_id_in(speak_id), made_at=datetime.now(UTC))

    async def _prepare(self, text: str) -> list[PreparedSegment]:
        """The segments of `text`. A long text is prepared in a thread: 4,000 brackets in Markdown take 80 ms."""
        prepared = functools.partial(
            prepare,
            text,
            self.input_format,
            pronunciations=self.pronunciations(),
            max_chars=MAX_RESPELLED * self.starter.settings.max_input_chars,
        )
        return prepared() if len(text) <= _SHORT_INPUT else await asyncio.to_thread(prepared)

    def _speak(self, segments: list[Segment], request_id: str) -> Speak:
        data, resolved = self.data, self.resolved
        return Speak(
            id=new_speak_id(request_id),
            client=self.starter.caller.client,
            limits=self.starter.caller.limits,
            access=self.starter.caller.access,
            priority=self.starter.caller.priority,
            deadline_s=self.starter.deadline_s,
            model=resolved.model.id,
            task=resolved.model.task,
            segments=segments,
            credit=INITIAL_CREDIT,
            voice=resolved.voice,
            saved_voice=resolved.saved_voice,
            language=resolved.language,
            instructions=resolved.instructions,
            reference_text=data.ref_text,
            x_vector_only=bool(data.x_vector_only_mode),
            sampling=resolved.sampling,
            non_streaming_mode=data.non_streaming_mode,
            timestamps=bool(data.timestamps),
            keep_alive_s=resolved.keep_alive_s,
            traceparent=traceparent(),
        )


@dataclass(frozen=True, kw_only=True)
class SpeechStarter:
    """Starts the requests of one client."""

    engine: EngineClient
    settings: Settings
    decoder_pool: DecoderPool
    caller: Caller
    deadline_s: float | None = None

    async def start(self, data: SpeechRequest, request_id: str) -> StartedSpeech:
        """Check `data`, and let the engine speak it. Raises ApiError."""
        check_input(data.input, self.settings.max_input_chars)
        return await (await self.plan(data)).start(data.input, request_id)

    async def start_for(self, request: Request[Any, Any, Any], data: SpeechRequest) -> StartedSpeech:
        """As `start`, for an HTTP request. The decoding of a recording ends when the client leaves."""
        starting = self.start(data, request_id_of(request.scope))
        return await (starting if data.ref_audio is None else cancel_on_disconnect(request, starting))

    async def plan(self, data: SpeechRequest) -> SpeechPlan:
        """Check everything of `data` but its input, and decode its recording. Raises ApiError."""
        audio_format = data.response_format or "mp3"
        rate = sample_rate(data, audio_format)
        resolved = await self._resolve(data)
        if data.timestamps and not resolved.model.timestamps:
            message = f"timestamps: {resolved.model.id} does not know when it says which word; espeak-ng does."
            raise ApiError("timestamps_unavailable", message, param="timestamps")
        reference = None
        if data.ref_audio is not None:
            if self.settings.require_consent:
                await require_consent(data.consent, self.engine, self.caller.client, self.caller.access)
            reference = await self.decoder_pool.decode_ref_audio(data.ref_audio)
        if rate != SAMPLE_RATE:
            await load_resampler()
        return SpeechPlan(
            starter=self,
            data=msgspec.structs.replace(data, ref_audio=None),  # 4 MB of base64 that are decoded now
            resolved=resolved,
            audio_format=audio_format,
            sample_rate=rate,
            reference=reference,
        )

    def pronunciations(self, data: SpeechRequest, resolved: Resolved) -> list[Pronunciations]:
        """The tables of respelled words for a request, an earlier one before a later one."""
        service = load_pronunciations(self.settings.pronunciations)
        tables = [Pronunciations(data.pronunciations)] if data.pronunciations else []
        tables += [table for name, table in service.items() if name != EVERY_LANGUAGE and resolved.speaks(name)]
        tables += [table for name, table in service.items() if name == EVERY_LANGUAGE]
        return tables

    async def _resolve(self, data: SpeechRequest) -> Resolved:
        catalog, snapshot = cached_catalog(self.engine)
        if data.model is not None and self.settings.model_aliases:
            data = msgspec.structs.replace(data, model=unaliased(data.model, self.settings.model_aliases))
        name = saved_voice_name(data, catalog, snapshot.default_model)
        caller = self.caller
        saved = await find_saved_voice(name, self.engine, caller.client, caller.access) if name is not None else None
        resolved = resolve(data, catalog, snapshot.default_model, saved, unknown_voice=self.settings.unknown_voice)
        self._require_allowed(resolved, saved)
        return resolved

    def _require_allowed(self, resolved: Resolved, saved: SavedVoice | None) -> None:
        """Raise ApiError if the key may not use this model or this voice."""
        self.caller.require_model(resolved.model.id)
        if saved is not None:
            self.caller.require_voice(saved.id, saved.name)
        else:
            presets = ((name, resolved.model.voice(name)) for name in self.caller.voices)
            self.caller.require_voice(*(name for name, preset in presets if preset and preset.id == resolved.voice))


def speech_starter(request: Request[Any, Any, Any], state: State) -> Any:
    """The starter for the client of `request`; app.py makes it the dependency `starter`."""
    return SpeechStarter(
        engine=state.engine,
        settings=state.settings,
        decoder_pool=state.decoder_pool,
        caller=caller_of(state.settings, request),
        deadline_s=_deadline_s(request.headers.get("x-deadline-ms")),
    )


def _deadline_s(header: str | None) -> float | None:
    """The header x-deadline-ms: the request is of no use if its audio begins later."""
    if header is None:
        return None
    if not _MILLISECONDS.fullmatch(header):
        raise ApiError("invalid_value", "x-deadline-ms: must be milliseconds, 1 to 99999999.", param="x-deadline-ms")
    return int(header) / 1000


SpeechStarterDependency = NamedDependency[SkipValidation[SpeechStarter]]
"""The annotation of the parameter `starter`."""
