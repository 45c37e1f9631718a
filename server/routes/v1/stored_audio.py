"""GET /v1/audio/speech/{id}/audio: the audio that `store: true` has kept, whole or in parts.

A player sends no key, so the id is the key: it is unguessable.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

from litestar import Request, Response, get
from litestar.params import PathParameter

from server.audio import StoredAudio
from server.dependencies import AudioStoreDependency
from server.http.errors import ApiError, documented, error_response
from server.http.ranges import UnsatisfiableError, http_date, is_unchanged, requested_range
from server.http.request_scope import is_head
from server.http.streaming import BrokenTransferError, ClosingStream

_ERRORS: Final = documented(400, 404, 416, 500)


@get(
    "/v1/audio/speech/{audio_id:str}/audio",
    operation_id="getStoredAudio",
    summary="Stored audio",
    tags=["Speech"],
    security=[{}],
    responses=_ERRORS,
)
async def get_stored_audio(
    request: Request[Any, Any, Any],
    audio_id: Annotated[str, PathParameter(description="The id in the `x-audio-url` of a response.")],
    audio_store: AudioStoreDependency,
) -> Response[Any]:
    """Audio of a request with `store: true`, once it is finished, with one range where the client asks for one.

    It is kept for TTS_AUDIO_STORE_TTL seconds, or until TTS_AUDIO_STORE_MB are full. The id is enough: it needs no key.
    """
    audio = await audio_store.open(audio_id)
    if audio is None:
        raise ApiError("not_found", "There is no audio with this id: it is not finished, has expired or never was.")
    try:
        return _response(request, audio, etag=f'"{audio_id}"')
    except BaseException:
        audio.close()
        raise


def _response(request: Request[Any, Any, Any], audio: StoredAudio, *, etag: str) -> Response[Any]:
    modified = http_date(audio.stored_at)
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": f"private, max-age={int(audio.expires_in_s)}",
        "ETag": etag,
        "Last-Modified": modified,
        "Vary": "Origin",  # what a player has got without an Origin lacks the headers that a script of its page needs
        "x-sample-rate": str(audio.facts.sample_rate),
    }
    if is_unchanged(request.headers, etag):
        audio.close()
        return Response(b"", status_code=304, headers=headers)
    part, status = None, 200
    try:
        # A range has a meaning for GET alone.
        part = (
            None
            if is_head(request.scope)
            else requested_range(request.headers, audio.size, etag=etag, modified=modified)
        )
    except UnsatisfiableError:
        audio.close()
        error = ApiError("range_not_satisfiable", f"The audio has {audio.size} bytes; the range begins behind them.")
        return error_response(error, headers | {"Content-Range": f"bytes */{audio.size}"})
    if part is not None:
        status = 206
        headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{audio.size}"
    part = part or range(audio.size)
    headers["Content-Length"] = str(len(part))
    media_type = audio.facts.media_type
    if is_head(request.scope):
        audio.close()
        return Response(b"", media_type=media_type, headers=headers)
    content = _pieces(audio, part)
    return ClosingStream(content, on_close=audio.close, media_type=media_type, headers=headers, status_code=status)


async def _pieces(audio: StoredAudio, part: range) -> AsyncIterator[bytes]:
    while part:
        piece = await audio.read(part.start, len(part))
        if not piece:
            raise BrokenTransferError("the file has been cut off")
        yield piece
        part = part[len(piece) :]
