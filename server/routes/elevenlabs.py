"""ElevenLabs' routes over HTTP, for its SDK: text to speech, voices and models. `voice_id` is any voice of ours.

What has no counterpart here is taken and has no effect: settings of the voice but `speed`, texts before and after,
dictionaries, and the bit rate in `output_format`. Errors have ElevenLabs' shape (server/http/elevenlabs_errors.py).
"""

import re
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final, Literal, TypeVar, cast

import msgspec
from litestar import Request, Response, get, post
from litestar.params import JSONBody, PathParameter, QueryParameter
from msgspec import Meta

from server.audio import MAX_SPEED, MIN_SPEED, SAMPLE_RATES, Format
from server.dependencies import EngineDependency, SettingsDependency
from server.engine import EngineClient
from server.http.auth import caller_of
from server.http.elevenlabs_errors import elevenlabs_documented
from server.http.errors import ApiError
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.leniency import TRIMMED
from server.http.request_scope import request_id_of
from server.http.streaming import can_break
from server.resolution import unaliased
from server.routes.speech_response import SpeechResponse, abort_on_failure
from server.routes.speech_start import SpeechStarter, SpeechStarterDependency, StartedSpeech
from server.routes.v1.voices import voices_for
from server.schemas import Name, SpeechRequest, VoiceObject
from shared.protocol import MAX_NAME
from shared.settings import Settings

T = TypeVar("T")

_TAGS: Final = ["ElevenLabs"]
_OUTPUT: Final = re.compile(r"(mp3|pcm|wav|opus|ulaw|alaw)_(\d{1,6})(?:_(\d{1,4}))?", re.IGNORECASE | re.ASCII)
_BEST_EFFORT: Final = {"language": "language_code", "seed": "seed"}
"""Our fields that ElevenLabs leaves out where a model does not know them -> its names."""

_BREAK: Final = re.compile(
    r"""<break\s{1,9}time\s{0,9}=\s{0,9}["']\s{0,9}([0-9.]{1,9}\s{0,9}m?s)\s{0,9}["']\s{0,9}/?>"""
)
"""Their mark of a pause, in a text that is no SSML otherwise."""

_LONGEST_BREAK: Final = 60
_BREAK_BEGUN: Final = re.compile(r"<(?:b(?:r(?:e(?:a(?:k(?:\s[^<>]{0,50})?)?)?)?)?)?\Z")
"""The beginning of such a mark at the end of a text."""

_THEIR_NAMES: Final = {"input": "text", "voice": "voice_id", "model": "model_id", "sample_rate": "output_format"}

_CATEGORIES: Final[dict[str, Literal["premade", "cloned", "generated"]]] = {
    "preset": "premade",
    "openai": "premade",
    "clone": "cloned",
    "design": "generated",
}


class VoiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Of ElevenLabs' settings, `speed` has an effect."""

    speed: Annotated[float, Meta(ge=MIN_SPEED, le=MAX_SPEED)] | None = None


class TextToSpeech(msgspec.Struct, frozen=True, kw_only=True):
    """A text, and how to speak it. Names of ElevenLabs' own models (`eleven_…`) stand for the default model."""

    text: Annotated[str, Meta(min_length=1)]
    model_id: Name | None = None
    language_code: Annotated[str, Meta(max_length=64, extra=TRIMMED)] | None = None
    voice_settings: VoiceSettings | None = None
    seed: Annotated[int, Meta(ge=0, le=4_294_967_295)] | None = None


class ElevenLabsVoice(msgspec.Struct, frozen=True, kw_only=True):
    """A voice as ElevenLabs lists it."""

    voice_id: str
    name: str
    category: Literal["premade", "cloned", "generated"]
    description: str
    labels: dict[str, str]
    high_quality_base_model_ids: list[str]
    samples: None = None
    preview_url: None = None
    settings: VoiceSettings = VoiceSettings(speed=1.0)
    available_for_tiers: list[str] = []


class ElevenLabsVoices(msgspec.Struct, frozen=True, kw_only=True):
    """All voices that the default model speaks with, on one page."""

    voices: list[ElevenLabsVoice]
    total_count: int
    has_more: bool = False
    next_page_token: str | None = None


class TextToSpeechJson(JsonBodyDto[TextToSpeech]):
    """The DTO of the request body."""

    decoder = JsonDecoder(TextToSpeech, {})


VoiceId = Annotated[str, PathParameter(description="A voice's id or name, or an OpenAI name.", max_length=MAX_NAME)]
OutputFormat = Annotated[
    str | None,
    QueryParameter(description="codec_rate or codec_rate_bitrate; the bit rate is the server's own.", max_length=40),
]


@post(
    "/v1/text-to-speech/{voice_id:str}",
    dto=TextToSpeechJson,
    return_dto=None,
    status_code=200,
    operation_id="elevenlabsConvert",
    summary="Speak a text, whole (ElevenLabs)",
    tags=_TAGS,
    responses=elevenlabs_documented(),
)
async def convert(
    request: Request[Any, Any, Any],
    data: JSONBody[TextToSpeech],
    voice_id: VoiceId,
    *,
    starter: SpeechStarterDependency,
    output_format: OutputFormat = None,
) -> Response[Any]:
    """Text in, one file of audio out."""
    started = await _start(starter, data, voice_id, output_format, request_id_of(request.scope))
    return await _answer(request, started, streaming=False)


@post(
    "/v1/text-to-speech/{voice_id:str}/stream",
    dto=TextToSpeechJson,
    return_dto=None,
    status_code=200,
    operation_id="elevenlabsStream",
    summary="Speak a text, streamed (ElevenLabs)",
    tags=_TAGS,
    responses=elevenlabs_documented(),
)
async def stream(
    request: Request[Any, Any, Any],
    data: JSONBody[TextToSpeech],
    voice_id: VoiceId,
    *,
    starter: SpeechStarterDependency,
    output_format: OutputFormat = None,
) -> Response[Any]:
    """Text in, audio out while it is made."""
    started = await _start(starter, data, voice_id, output_format, request_id_of(request.scope))
    return await _answer(request, started, streaming=can_break(request))


@get(
    "/v1/voices",
    operation_id="elevenlabsVoices",
    summary="List the voices (ElevenLabs)",
    tags=_TAGS,
    responses=elevenlabs_documented(),
)
async def list_voices(
    request: Request[Any, Any, Any], engine: EngineDependency, settings: SettingsDependency
) -> ElevenLabsVoices:
    """The voices of the default model, for `voice_id`."""
    return await _list(request, engine, settings)


@get(
    "/v2/voices",
    operation_id="elevenlabsVoices2",
    summary="List the voices (ElevenLabs)",
    tags=_TAGS,
    responses=elevenlabs_documented(),
)
async def list_voices_2(
    request: Request[Any, Any, Any], engine: EngineDependency, settings: SettingsDependency
) -> ElevenLabsVoices:
    """The same as /v1/voices, whatever is searched for: all voices are on one page."""
    return await _list(request, engine, settings)


@get(
    "/v1/voices/{voice_id:str}",
    operation_id="elevenlabsVoice",
    summary="Get a voice (ElevenLabs)",
    tags=_TAGS,
    responses=elevenlabs_documented(),
)
async def get_voice(
    request: Request[Any, Any, Any], voice_id: VoiceId, engine: EngineDependency, settings: SettingsDependency
) -> ElevenLabsVoice:
    """The voice with that id or name."""
    wanted = voice_id.casefold()
    for voice in await _voices(request, engine, settings):
        if wanted in (voice.id.casefold(), voice.name.casefold()):
            return _voice(voice)
    raise ApiError("voice_not_found", "There is no voice with this id or name.", param="voice_id")


async def _voices(request: Request[Any, Any, Any], engine: EngineClient, settings: Settings) -> list[VoiceObject]:
    return (await voices_for(None, engine, settings, caller_of(settings, request).access)).voices


async def _list(request: Request[Any, Any, Any], engine: EngineClient, settings: Settings) -> ElevenLabsVoices:
    voices = [_voice(voice) for voice in await _voices(request, engine, settings)]
    return ElevenLabsVoices(voices=voices, total_count=len(voices))


async def _start(
    starter: SpeechStarter, data: TextToSpeech, voice_id: str, output_format: str | None, request_id: str
) -> StartedSpeech:
    """Start the speech. A language or a seed that the model does not know is left out, and named as ignored."""
    fields = speech_fields(
        data.text,
        voice_id,
        output_format,
        settings=starter.settings,
        model_id=data.model_id,
        language_code=data.language_code,
        speed=data.voice_settings.speed if data.voice_settings else None,
        seed=data.seed,
    )
    started, ignored = await best_effort(fields, lambda fields: starter.start(fields, request_id))
    return started.ignoring(*ignored)


def speech_fields(
    text: str,
    voice_id: str,
    output_format: str | None,
    *,
    settings: Settings,
    model_id: str | None,
    language_code: str | None,
    speed: float | None,
    seed: int | None,
) -> SpeechRequest:
    """A request of ElevenLabs' clients as one of ours."""
    audio_format, rate = _output(output_format)
    model = unaliased(model_id, settings.model_aliases) if model_id else None
    return SpeechRequest(
        input=pauses_of(text),
        model=None if model is None or model.lower().startswith("eleven_") else model,
        voice=voice_id,
        response_format=audio_format,
        sample_rate=rate,
        language=language_code,
        speed=speed,
        seed=seed,
    )


def pauses_of(text: str) -> str:
    """`text` with our marks of pauses in the place of theirs."""
    return _BREAK.sub(r"[pause:\1]", text)


def without_begun_pause(text: str) -> str:
    """`text` up to the mark of a pause that has begun at its end."""
    begun = _BREAK_BEGUN.search(text, max(0, len(text) - _LONGEST_BREAK))
    return text if begun is None else text[: begun.start()]


async def best_effort(fields: SpeechRequest, attempt: Callable[[SpeechRequest], Awaitable[T]]) -> tuple[T, list[str]]:
    """The result of `attempt`, without the fields that the model does not know; their names in ElevenLabs' API.

    Raises ApiError with ElevenLabs' names of fields.
    """
    ignored: list[str] = []
    while True:
        try:
            return await attempt(fields), ignored
        except ApiError as error:
            if error.param not in _BEST_EFFORT or getattr(fields, error.param) is None:
                raise _in_their_words(error) from None
            ignored.append(_BEST_EFFORT[error.param])
            fields = msgspec.structs.replace(fields, **{error.param: None})


def _in_their_words(error: ApiError) -> ApiError:
    """`error` with ElevenLabs' name of the field."""
    ours = error.param or ""
    theirs = _THEIR_NAMES.get(ours, ours) or None
    message = error.message
    if theirs and message.startswith(ours):
        message = theirs + message.removeprefix(ours)
    return ApiError(error.code, message, param=theirs, retry_after_s=error.retry_after_s, status=error.status)


def _output(name: str | None) -> tuple[Format, int]:
    """The format and rate of an `output_format`."""
    match = _OUTPUT.fullmatch((name or "").strip() or "mp3_44100_128")
    if match is not None:
        codec, rate = cast("Format", match[1].lower()), int(match[2])
        if rate in SAMPLE_RATES[codec]:
            return codec, rate
    form = "codec_rate or codec_rate_bitrate, such as mp3_44100_128, pcm_24000, opus_48000_64, ulaw_8000"
    raise ApiError("invalid_value", f"output_format: must be {form}.", param="output_format")


async def _answer(request: Request[Any, Any, Any], started: StartedSpeech, *, streaming: bool) -> Response[Any]:
    with abort_on_failure(started.speech):
        response = SpeechResponse(request, started, streaming=streaming)
        answer: Response[Any] = await (response.audio() if streaming else response.whole())
    answer.headers["request-id"] = request_id_of(request.scope)
    return answer


def _voice(voice: VoiceObject) -> ElevenLabsVoice:
    return ElevenLabsVoice(
        voice_id=voice.id,
        name=voice.name,
        category=_CATEGORIES[voice.kind],
        description=voice.description,
        labels={"language": voice.language},
        high_quality_base_model_ids=[voice.model],
    )
