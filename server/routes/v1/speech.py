"""POST /v1/audio/speech: start a request, and answer it in one of its three forms.

speech_start.py resolves the request and sends it to the engine; speech_response.py sends the speech to the client.
"""

from typing import Any

from litestar import Request, Response, post
from litestar.params import JSONBody

from server.audio import AudioFacts
from server.dependencies import AudioStoreDependency, SettingsDependency
from server.http.errors import ApiError, documented
from server.http.forwarded import client_view
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.request_scope import request_id_of
from server.http.streaming import can_break
from server.routes.audio_keeper import Keeper
from server.routes.speech_response import SpeechResponse, abort_on_failure
from server.routes.speech_start import SpeechStarterDependency
from server.schemas import ALIASES, SpeechRequest


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
    description="Text in, audio out. Fields that are not known here are ignored. With the header `x-deadline-ms`, the "
    "request fails (504) if its audio has not begun so many milliseconds after it came.",
    tags=["Speech"],
    responses=documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
)
async def create_speech(
    request: Request[Any, Any, Any],
    data: JSONBody[SpeechRequest],
    *,
    starter: SpeechStarterDependency,
    settings: SettingsDependency,
    audio_store: AudioStoreDependency,
) -> Response[Any]:
    """Speak `data`."""
    if data.stream is False and data.stream_format == "sse":
        raise ApiError("invalid_value", "stream: false and stream_format: sse contradict each other.", param="stream")
    if data.store and not settings.audio_store_mb:
        raise ApiError("invalid_value", "store: this server keeps no audio (TTS_AUDIO_STORE_MB=0).", param="store")
    whole = data.stream is False or (data.stream_format != "sse" and not can_break(request))
    started = await starter.start_for(request, data)
    if data.timestamps and data.stream_format != "sse":
        started = started.ignoring("timestamps")
    with abort_on_failure(started.speech):
        keeper = None
        if data.store:
            copy = None if whole else started.encoder(streaming=False)
            facts = AudioFacts(
                media_type=started.media_type,
                sample_rate=started.sample_rate,
                designed=started.resolved.model.task == "VoiceDesign",
            )
            prefix = client_view(settings, request.scope).prefix
            keeper = Keeper(audio_store, facts, copy, prefix=prefix, request_id=request_id_of(request.scope))
        response = SpeechResponse(request, started, streaming=not whole, keeper=keeper)
        if whole:
            return await response.whole()
        return await (response.events() if data.stream_format == "sse" else response.audio())
