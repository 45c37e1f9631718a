"""The answer to one request for speech, in its three forms: whole, bytes as they are made, server-sent events.

It owns the life of a request between the client and the engine: nothing is spoken for a client that has left,
every failure before the first byte is a status, and none after it ends cleanly.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
import structlog
from litestar import Request, Response

from server.audio import Encoder
from server.engine import Speech
from server.http.errors import ApiError, envelope
from server.http.request_ids import request_id_of
from server.http.streaming import BrokenTransferError, ClosingStream, until_gone, while_there
from server.schemas import SpeechDelta, SpeechDone, SpeechUsage
from shared.pcm import SAMPLE_RATE
from shared.protocol import Finished, Timings

_log = structlog.stdlib.get_logger(__name__)

KEEPALIVE_S: Final = 5.0
"""Between two SSE comments while the queue holds a request: well below the 30 s after which proxies give up."""

SSE_GRACE_S: Final = 0.5
"""How long an SSE answer waits for its first sound before the status goes out: refusals are statuses there, too."""

MAX_WHOLE_BYTES: Final = 512 * 1024 * 1024
"""What one whole-body answer may hold in memory: three hours of PCM."""

_encode = msgspec.json.Encoder().encode


class Answer:
    """One request's answer, in one of three forms."""

    def __init__(
        self, request: Request[Any, Any, Any], speech: Speech, encoder: Encoder, *, model: str, media_type: str
    ) -> None:
        self._request = request
        self._speech = speech
        self._encoder = encoder
        self._began = time.monotonic()
        self._media_type = media_type
        self._headers = {
            "x-sample-rate": str(SAMPLE_RATE),
            "x-model": model,
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }

    async def whole(self) -> Response[bytes]:
        """The body at once, with its length and where the time went."""
        body, finished = await while_there(self._request, self._gather())
        self._log("spoken", finished)
        timing = {"x-finish-reason": finished.reason, "Server-Timing": _server_timing(finished.timings)}
        return Response(body, media_type=self._media_type, headers=self._headers | timing, status_code=200)

    async def audio(self) -> ClosingStream:
        """The bytes as they are made; what fails before the first of them raises here."""
        first = self._first_chunk()
        await until_gone(self._request, first)
        first.result()
        return self._stream(self._as_audio(first), first, self._media_type)

    async def events(self) -> ClosingStream:
        """Server-sent events; what fails within the grace raises here, what fails later is an event."""
        first = self._first_chunk()
        if await until_gone(self._request, first, SSE_GRACE_S):
            first.result()
        return self._stream(self._as_events(first), first, "text/event-stream")

    def _first_chunk(self) -> asyncio.Task[bytes | None]:
        first = asyncio.create_task(self._speech.chunk())
        # A client may leave before anyone asks for the outcome.
        first.add_done_callback(lambda task: task.cancelled() or task.exception())
        return first

    def _stream(
        self, content: AsyncIterator[bytes], first: asyncio.Task[bytes | None], media_type: str
    ) -> ClosingStream:
        def close() -> None:
            first.cancel()
            self._speech.abort()
            # A cancelled stream lies in a reference cycle of anyio's until it is collected: not with 7 MB of FLAC.
            del self._encoder
            self._log("spoken" if self._speech.finished else "broken off", self._speech.finished)

        return ClosingStream(content, on_close=close, media_type=media_type, headers=self._headers, status_code=200)

    async def _as_audio(self, first: asyncio.Task[bytes | None]) -> AsyncIterator[bytes]:
        try:
            async for data in self._encoded(await first):
                yield data
        except ApiError as error:
            raise BrokenTransferError(error.message) from error

    async def _as_events(self, first: asyncio.Task[bytes | None]) -> AsyncIterator[bytes]:
        while not (await asyncio.wait({first}, timeout=KEEPALIVE_S))[0]:
            yield b": keepalive\n\n"
        try:
            async for data in self._encoded(await first):
                yield _event(SpeechDelta(audio=base64.b64encode(data).decode()))
        except ApiError as error:
            yield _event({"type": "speech.audio.error", "error": envelope(error).error})
            return
        used = self._finished().usage
        total = used.input_tokens + used.output_tokens
        usage = SpeechUsage(input_tokens=used.input_tokens, output_tokens=used.output_tokens, total_tokens=total)
        yield _event(SpeechDone(usage=usage))

    async def _encoded(self, pcm: bytes | None) -> AsyncIterator[bytes]:
        while pcm is not None:
            if data := self._encoder.feed(pcm):
                yield data
            pcm = await self._speech.chunk()
        if data := self._encoder.finish():
            yield data

    async def _gather(self) -> tuple[bytes, Finished]:
        parts = []
        size = 0
        while (pcm := await self._speech.chunk()) is not None:
            parts.append(self._encoder.feed(pcm))
            size += len(pcm)
            if size > MAX_WHOLE_BYTES:
                raise ApiError("invalid_value", "stream: too much speech for a whole body; stream it.", param="stream")
        parts.append(self._encoder.finish())
        return b"".join(parts), self._finished()

    def _finished(self) -> Finished:
        if self._speech.finished is None:
            raise ApiError("synthesis_failed", "The speech ended without an end.")
        return self._speech.finished

    def _log(self, event: str, finished: Finished | None) -> None:
        _log.info(
            event,
            request_id=request_id_of(self._request.scope),
            model=self._headers["x-model"],
            format=self._media_type,
            reason=finished.reason if finished else None,
            tokens=finished.usage.output_tokens if finished else None,
            seconds=round(time.monotonic() - self._began, 3),
        )


def _event(data: Any) -> bytes:
    return b"data: " + _encode(data) + b"\n\n"


def _server_timing(timings: Timings) -> str:
    """Where the time went, in milliseconds, as browsers' tools show it."""
    parts = {
        "queue": timings.queue_s,
        "load": timings.load_s,
        "first_audio": timings.first_audio_s,
        "total": timings.total_s,
    }
    return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in parts.items())
