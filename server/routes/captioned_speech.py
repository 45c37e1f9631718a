"""POST /dev/captioned_speech, as Kokoro-FastAPI's clients know it: audio and the times of its words, as JSON lines."""

from typing import Annotated, Any

import msgspec
from litestar import Request, Response, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from msgspec import Meta

from server.http.errors import documented
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.streaming import can_break
from server.routes.speech_response import CaptionedAudio, SpeechResponse, abort_on_failure
from server.routes.speech_start import SpeechStarterDependency
from server.schemas import ALIASES, SpeechRequest


class CaptionedRequest(SpeechRequest, frozen=True, kw_only=True):
    """A request for speech whose words have times."""

    return_timestamps: Annotated[bool | None, Meta(description="false: audio without times, from any model.")] = None


class CaptionedJson(JsonBodyDto[CaptionedRequest]):
    """The DTO of the request body."""

    decoder = JsonDecoder(CaptionedRequest, ALIASES)


@post(
    "/dev/captioned_speech",
    dto=CaptionedJson,
    return_dto=None,
    status_code=200,
    operation_id="createCaptionedSpeech",
    summary="Speak a text, with the times of its words",
    tags=["Speech"],
    responses={
        200: ResponseSpec(CaptionedAudio, description="A line of JSON for each part.", generate_examples=False),
        **documented(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    },
)
async def create_captioned_speech(
    request: Request[Any, Any, Any],
    data: JSONBody[CaptionedRequest],
    *,
    starter: SpeechStarterDependency,
) -> Response[Any]:
    """One JSON object a line while the audio is made; with `stream: false` one in all.

    The words are those of `input`. Models that do not know when they say a word answer `timestamps_unavailable`.
    """
    data = msgspec.structs.replace(data, timestamps=data.return_timestamps is not False)
    whole = data.stream is False or not can_break(request)
    started = await starter.start_for(request, data)
    no_effect = {"store": data.store, "stream_format": data.stream_format == "sse"}
    started = started.ignoring(*(name for name, given in no_effect.items() if given))
    with abort_on_failure(started.speech):
        response = SpeechResponse(request, started, streaming=not whole)
        return await (response.whole_captioned() if whole else response.captioned())
