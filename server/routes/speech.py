"""POST /v1/audio/speech: resolve the request's fields and send them to the engine as one `Speak`.

speech_response.py sends the speech to the client.
"""

from typing import Any

import msgspec
from litestar import Request, Response, post
from litestar.params import JSONBody

from server.audio import CONTENT_TYPES, AudioFacts, Encoder, load_resampler
from server.dependencies import AudioStoreDependency, DecoderPoolDependency, EngineDependency, SettingsDependency
from server.engine import INITIAL_CREDIT, EngineClient, cached_catalog, find_saved_voice, silent_speech
from server.http.auth import client_of
from server.http.errors import ApiError, documented
from server.http.forwarded import client_view
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.request_scope import request_id_of
from server.http.streaming import can_break, cancel_on_disconnect
from server.resolution import Resolved, check_input, resolve, sample_rate, saved_voice_name, unaliased
from server.routes.audio_keeper import Keeper
from server.routes.speech_response import SpeechResponse, failure_of
from server.schemas import ALIASES, SpeechRequest
from shared.pcm import SAMPLE_RATE
from shared.protocol import Speak, new_speak_id
from shared.settings import Settings
from shared.text import is_speakable


class SpeechJson(JsonBodyDto[SpeechRequest]):
    """The DTO of the request body."""

    decoder = JsonDecoder(SpeechRequest, ALIASES)


@post(
    "/speech",
    dto=SpeechJson,
    return_dto=None,
    status_code=200,
    operation_id="createSpeech",
    summary="Speak a text",
    description="Text in, audio out. Fields that are not known here are ignored.",
    tags=["Speech"],
    responses=documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503),
)
async def create_speech(
    request: Request[Any, Any, Any],
    data: JSONBody[SpeechRequest],
    *,
    engine: EngineDependency,
    settings: SettingsDependency,
    decoder_pool: DecoderPoolDependency,
    audio_store: AudioStoreDependency,
) -> Response[Any]:
    """Speak `data`."""
    check_input(data.input, settings.max_input_chars)
    if data.stream is False and data.stream_format == "sse":
        raise ApiError("invalid_value", "stream: false and stream_format: sse contradict each other.", param="stream")
    if data.store and not settings.audio_store_mb:
        raise ApiError("invalid_value", "store: this server keeps no audio (TTS_AUDIO_STORE_MB=0).", param="store")
    whole = data.stream is False or (data.stream_format != "sse" and not can_break(request))
    audio_format = data.response_format or "mp3"
    rate = sample_rate(data, audio_format)
    client = client_of(settings, request)
    resolved = await _resolve(data, engine, settings, client)
    reference = None
    if data.ref_audio is not None:
        reference = await cancel_on_disconnect(request, decoder_pool.decode_ref_audio(data.ref_audio))
    if rate != SAMPLE_RATE:
        await load_resampler()
    speak = _speak(data, resolved, client, request_id_of(request.scope))
    empty = not is_speakable(data.input)
    speech = silent_speech(speak, engine) if empty else engine.speak(speak, reference)
    try:
        speed = 1.0 if empty else data.speed or 1.0
        encoder = Encoder(audio_format, speed=speed, sample_rate=rate, streaming=not whole)
        media_type = CONTENT_TYPES[audio_format]
        keeper = None
        if data.store:
            copy = None if whole else Encoder(audio_format, speed=speed, sample_rate=rate, streaming=False)
            facts = AudioFacts(media_type=media_type, sample_rate=rate)
            keeper = Keeper(audio_store, facts, copy, prefix=client_view(settings, request.scope).prefix)
        response = SpeechResponse(request, speech, encoder, resolved=resolved, media_type=media_type, keeper=keeper)
        if whole:
            return await response.whole()
        return await (response.events() if data.stream_format == "sse" else response.audio())
    except BaseException as error:
        speech.abort(failure_of(error))
        raise


async def _resolve(data: SpeechRequest, engine: EngineClient, settings: Settings, client: str) -> Resolved:
    catalog, snapshot = cached_catalog(engine)
    if data.model is not None and settings.model_aliases:
        data = msgspec.structs.replace(data, model=unaliased(data.model, settings.model_aliases))
    name = saved_voice_name(data, catalog, snapshot.default_model)
    saved = await find_saved_voice(name, engine, client) if name is not None else None
    return resolve(data, catalog, snapshot.default_model, saved, unknown_voice=settings.unknown_voice)


def _speak(data: SpeechRequest, resolved: Resolved, client: str, request_id: str) -> Speak:
    return Speak(
        id=new_speak_id(request_id),
        client=client,
        model=resolved.model.id,
        task=resolved.model.task,
        text=data.input,
        credit=INITIAL_CREDIT,
        voice=resolved.voice,
        saved_voice=resolved.saved_voice,
        language=resolved.language,
        instructions=resolved.instructions,
        reference_text=data.ref_text,
        x_vector_only=bool(data.x_vector_only_mode),
        sampling=resolved.sampling,
        non_streaming_mode=data.non_streaming_mode,
        keep_alive_s=resolved.keep_alive_s,
    )
