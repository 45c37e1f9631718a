"""The response to one speech request, in its three forms: a whole body, streamed audio, server-sent events.

It owns the request between the client and the engine. It aborts the speech when the client disconnects.
A failure before the first byte is an HTTP status; after a later one the response never ends cleanly.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import structlog
from litestar import Request, Response
from msgspec import UNSET

from server.audio import Encoder
from server.engine import Chunk, Speech
from server.http.errors import CLIENT_GONE, ApiError, envelope, internal_error, rate_limit_headers
from server.http.request_scope import request_id_of
from server.http.streaming import BrokenTransferError, ClosingStream, cancel_on_disconnect, wait_while_connected
from server.routes.audio_keeper import Keeper
from server.routes.speech_start import StartedSpeech
from server.schemas import SpeechDelta, SpeechDone, TimedWord, usage_of
from shared.protocol import Finished, Timings, speech_id_of

log = structlog.get_logger(__name__)

KEEPALIVE_S: Final = 5.0
"""The pause between two SSE comments while the request is queued; proxies give up after 30 s of silence."""

SSE_GRACE_S: Final = 0.5
"""How long an SSE response waits for the first audio before it sends status 200: a refusal within it is a status."""

ERROR_FLUSH_S: Final = 0.25
"""The pause between an error event and the break of its transfer: a reset discards what is still to be written."""

MAX_WHOLE_BYTES: Final = 512 * 1024 * 1024
"""PCM that one whole body may hold in memory: three hours."""

Form = Callable[[asyncio.Task[Chunk | None]], AsyncIterator[bytes]]
"""The bytes of a stream, from its first chunk on."""

_encode = msgspec.json.Encoder().encode


class CaptionedAudio(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the audio in base64, its media type, and the words that are complete now; null if none are wanted."""

    audio: bytes
    audio_format: str
    timestamps: list[TimedWord] | None


class SpeechResponse:
    """The response to one request; one of its methods is called, once."""

    def __init__(
        self,
        request: Request[Any, Any, Any],
        started: StartedSpeech,
        *,
        streaming: bool = True,
        keeper: Keeper | None = None,
    ) -> None:
        """Without `streaming`, only `whole` may be called. `keeper` stores the audio once it is finished."""
        self._request = request
        self._speech = started.speech
        self._encoder = started.encoder(streaming=streaming)
        self._keeper = keeper
        self._captions = started.captions()
        self._began = time.monotonic()
        self._complete = False
        self._failure: ApiError | None = None
        self._media_type = started.media_type
        self._headers = {
            "x-sample-rate": str(started.sample_rate),
            "x-model": started.resolved.model.id,
            "x-speech-id": speech_id_of(started.speech.id),
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        if keeper is not None:
            self._headers["x-audio-url"] = keeper.path
        if started.speech.finished is not None:
            self._headers["x-finish-reason"] = started.speech.finished.reason
        if started.resolved.ignored:
            self._headers["x-ignored"] = ", ".join(started.resolved.ignored)

    async def whole(self) -> Response[bytes]:
        """The whole body, with Content-Length, finish reason and Server-Timing."""
        body, finished = await cancel_on_disconnect(self._request, self._whole_body())
        if self._keeper is not None and not await self._keeper.keep(body):
            del self._headers["x-audio-url"]
        self._log("speech_finished", finished)
        timing = {"x-finish-reason": finished.reason, "Server-Timing": _server_timing(finished.timings)}
        headers = self._headers | timing | rate_limit_headers(self._speech.rate_limit)
        return Response(body, media_type=self._media_type, headers=headers, status_code=200)

    async def whole_captioned(self) -> Response[bytes]:
        """The whole audio and all of its words in one JSON object."""
        body, finished = await cancel_on_disconnect(self._request, self._whole_body())
        self._log("speech_finished", finished)
        words = self._captions.rest() if self._captions else None
        line = _encode(CaptionedAudio(audio=body, audio_format=self._media_type, timestamps=words))
        headers = self._headers | rate_limit_headers(self._speech.rate_limit)
        return Response(line, media_type="application/json", headers=headers, status_code=200)

    async def captioned(self) -> ClosingStream:
        """A stream of JSON lines, audio and words; a failure before the first of them is raised here."""
        return await self._stream(self._as_captioned, "application/x-ndjson", of_lines=True)

    async def audio(self) -> ClosingStream:
        """A stream of audio bytes; a failure before the first of them is raised here."""
        return await self._stream(self._as_audio, self._media_type, of_lines=False)

    async def events(self) -> ClosingStream:
        """A stream of server-sent events; a failure within SSE_GRACE_S is raised here, a later one is an event."""
        return await self._stream(self._as_events, "text/event-stream", of_lines=True, grace_s=SSE_GRACE_S)

    async def _stream(
        self, form: Form, media_type: str, *, of_lines: bool, grace_s: float | None = None
    ) -> ClosingStream:
        """The stream, once its first chunk has come or failed, or `grace_s` are over."""
        first = asyncio.create_task(self._speech.chunk())
        # Retrieves the error of a task whose client disconnects before its result is used; asyncio would log it.
        first.add_done_callback(lambda task: task.cancelled() or task.exception())
        if await wait_while_connected(self._request, first, grace_s):
            first.result()

        def close() -> None:
            first.cancel()
            if not self._complete:
                self._speech.abort(self._failure)
            # A cancelled stream stays in a reference cycle of anyio's until the garbage collector comes:
            # without this line, 7 MB of FLAC would stay with it.
            del self._encoder, self._keeper
            self._log("speech_finished" if self._speech.finished else "speech_broken_off", self._speech.finished)

        headers = self._headers | rate_limit_headers(self._speech.rate_limit)
        return ClosingStream(
            form(first), on_close=close, of_lines=of_lines, media_type=media_type, headers=headers, status_code=200
        )

    async def _as_audio(self, first: asyncio.Task[Chunk | None]) -> AsyncIterator[bytes]:
        try:
            async for data in self._encoded(first):
                yield data
            self._complete = True
        except ApiError as error:
            raise BrokenTransferError(error.message) from error

    async def _as_captioned(self, first: asyncio.Task[Chunk | None]) -> AsyncIterator[bytes]:
        def line(data: bytes, words: list[TimedWord] | None) -> bytes:
            return _encode(CaptionedAudio(audio=data, audio_format=self._media_type, timestamps=words)) + b"\n"

        try:
            async for data in self._encoded(first):
                yield line(data, self._captions.complete() if self._captions else None)
        except ApiError as error:
            raise BrokenTransferError(error.message) from error
        if self._captions and (words := self._captions.rest()):
            yield line(b"", words)
        self._complete = True

    async def _as_events(self, first: asyncio.Task[Chunk | None]) -> AsyncIterator[bytes]:
        while not (await asyncio.wait({first}, timeout=KEEPALIVE_S))[0]:
            yield b": keepalive\n\n"
        try:
            async for data in self._encoded(first):
                words = self._captions.complete() if self._captions else UNSET
                yield _event(SpeechDelta(audio=base64.b64encode(data).decode(), timestamps=words))
        except ApiError as error:
            yield _event({"type": "speech.audio.error", "error": envelope(error).error})
            # Clients exist that ignore the event, and would take the part for the whole.
            await asyncio.sleep(ERROR_FLUSH_S)
            raise BrokenTransferError(error.message) from error
        finished = finished_of(self._speech)
        words = self._captions.rest() if self._captions else UNSET
        yield _event(SpeechDone(usage=usage_of(finished.usage), finish_reason=finished.reason, timestamps=words))
        self._complete = True

    async def _encoded(self, first: asyncio.Task[Chunk | None]) -> AsyncIterator[bytes]:
        try:
            chunk = await first
            while chunk is not None:
                if self._captions is not None:
                    self._captions.feed(chunk)
                if self._keeper is not None:
                    self._keeper.feed(chunk.pcm, chunk.rate)
                if data := self._encoder.feed(chunk.pcm, chunk.rate):
                    yield data
                chunk = await self._speech.chunk()
            if data := self._encoder.finish():
                yield data
            if self._keeper is not None:
                await self._keeper.finish()  # before the end of the stream: its client may ask at once
        except Exception as error:
            self._failure = _failure_of(error)
            raise

    async def _whole_body(self) -> tuple[bytes, Finished]:
        return await whole_body(self._speech, self._encoder, self._captions.feed if self._captions else _nothing)

    def _log(self, event: str, finished: Finished | None) -> None:
        log.info(
            event,
            request_id=request_id_of(self._request.scope),
            model=self._headers["x-model"],
            format=self._media_type,
            reason=finished.reason if finished else self._failure.code if self._failure else "client_gone",
            tokens=finished.usage.output_tokens if finished else None,
            seconds=round(time.monotonic() - self._began, 3),
        )


async def whole_body(speech: Speech, encoder: Encoder, look: Callable[[Chunk], None]) -> tuple[bytes, Finished]:
    """The whole audio. `look` gets every chunk before it is encoded, and may raise."""
    parts = []
    size = 0
    while (chunk := await speech.chunk()) is not None:
        look(chunk)
        parts.append(encoder.feed(chunk.pcm, chunk.rate))
        size += len(chunk.pcm)
        if size > MAX_WHOLE_BYTES:
            raise ApiError("invalid_value", "stream: too much speech for a whole body; stream it.", param="stream")
    parts.append(encoder.finish())
    return b"".join(parts), finished_of(speech)


def finished_of(speech: Speech) -> Finished:
    """The last message of a speech whose chunks have all come."""
    if speech.finished is None:
        raise ApiError("synthesis_failed", "The GPU worker sent no final message.")
    return speech.finished


def _failure_of(error: BaseException) -> ApiError | None:
    """Why a response failed that ended with `error`; None if its client has left."""
    if isinstance(error, ApiError):
        return None if error.status == CLIENT_GONE else error
    if isinstance(error, Exception):
        return internal_error()
    return None  # cancelled, or never begun


@contextmanager
def abort_on_failure(speech: Speech) -> Iterator[None]:
    """Abort `speech` if the block fails or is left early: its client does not get the rest."""
    try:
        yield
    except BaseException as error:
        speech.abort(_failure_of(error))
        raise


def _nothing(_chunk: Chunk) -> None:
    pass


def _event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def _server_timing(timings: Timings) -> str:
    """The Server-Timing header: durations in milliseconds, which browsers' developer tools display."""
    parts = {
        "queue": timings.queue_s,
        "load": timings.load_s,
        "first_audio": timings.first_audio_s,
        "total": timings.total_s,
    }
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in parts.items())
