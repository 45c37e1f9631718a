"""GET /v1/audio/speech/{id}: how a request ended, which the headers of a stream cannot say.

The GPU worker keeps the outcomes, so that every web worker answers alike.
"""

from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get
from litestar.params import PathParameter

from server.dependencies import EngineDependency, SettingsDependency
from server.engine import find_speech
from server.http.auth import client_of, owner_of
from server.http.errors import ApiError, ErrorBody, documented, envelope
from server.schemas import SpeechUsage, usage_of
from shared.protocol import FinishReason, SpeechOutcome, SpeechStatus, Timings, speech_id_of

SpeechId = Annotated[str, PathParameter(description="The `x-request-id` or the `x-speech-id` of the response.")]


class SpeechObject(msgspec.Struct, frozen=True, kw_only=True):
    """A request: how it ended, or how far it is. `id` is its `x-speech-id`.

    `finish_reason` and `usage` are there if it is done, `timings` (in seconds) if it has ended, `error` if it failed.
    `queue_position` counts from 1, while it is queued.
    """

    id: str
    status: SpeechStatus
    model: str
    voice: str
    finish_reason: FinishReason | None
    usage: SpeechUsage | None
    timings: Timings | None
    error: ErrorBody | None
    queue_position: int | None
    object: Literal["audio.speech"] = "audio.speech"


@get(
    "/speech/{speech_id:str}",
    operation_id="getSpeech",
    summary="How a request ended",
    tags=["Speech"],
    responses=documented(400, 401, 403, 404, 500, 503),
)
async def get_speech(
    request: Request[Any, Any, Any], speech_id: SpeechId, engine: EngineDependency, settings: SettingsDependency
) -> SpeechObject:
    """The last 1,024 requests are kept, until the GPU worker is replaced. Of a request id that was used more than
    once, the latest request counts. Where keys are configured, a client sees its own requests alone.
    """
    outcome = await find_speech(speech_id, engine, client_of(settings, request), owner_of(settings, request))
    return _speech_object(outcome)


def _speech_object(outcome: SpeechOutcome) -> SpeechObject:
    error = outcome.error
    return SpeechObject(
        id=speech_id_of(outcome.id),
        status=outcome.status,
        model=outcome.model,
        voice=outcome.voice,
        finish_reason=outcome.finish_reason,
        usage=usage_of(outcome.usage) if outcome.usage else None,
        timings=outcome.timings,
        error=envelope(ApiError(error.code, error.message, param=error.param)).error if error else None,
        queue_position=outcome.queue_position,
    )
