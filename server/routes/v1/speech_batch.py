"""POST /v1/audio/speech/batch: several requests in one, with one result each, whose failures are their own.

The results are held in memory until all have come: MAX_BATCH_BYTES of them, and PER_BATCH_AT_ONCE speak side by side.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import structlog
from litestar import Request, post
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import JSONBody
from litestar.typing import FieldDefinition
from msgspec import Meta

from server.engine import Chunk
from server.http.errors import ApiError, ErrorBody, documented, envelope, internal_error
from server.http.json_bodies import JsonBodyDto, JsonDecoder
from server.http.request_scope import request_id_of
from server.http.streaming import ClosingStream
from server.routes.speech_response import KEEPALIVE_S, abort_on_failure, whole_body
from server.routes.speech_start import SpeechStarter, SpeechStarterDependency
from server.routes.v1.speech import SpeechJson
from server.schemas import SpeechRequest, SpeechUsage, TimedWord, usage_of
from shared.protocol import FinishReason, speech_id_of

if TYPE_CHECKING:
    from litestar._openapi.schema_generation import SchemaCreator
    from litestar.openapi.spec import Reference, Schema

MAX_ITEMS: Final = 32

PER_BATCH_AT_ONCE: Final = 8
"""Items that are with the GPU worker at the same time: a batch must not fill the queue for others."""

MAX_BATCH_BYTES: Final = 256 * 1024 * 1024
"""Of a batch in memory: audio that is finished, and PCM (48 kB a second) of what is being spoken."""

log = structlog.get_logger(__name__)
_encode = msgspec.json.Encoder().encode


class SpeechBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Requests for speech. Each field of a request may stand beside `items`, too: as the default for all of them."""

    items: Annotated[list[SpeechRequest], Meta(min_length=1, max_length=MAX_ITEMS)]


class BatchResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one item: `audio_data` (base64) with its facts, or `error`."""

    index: int
    status: Literal["success", "error"]
    id: str | None = None
    audio_data: bytes | None = None
    media_type: str | None = None
    sample_rate: int | None = None
    finish_reason: FinishReason | None = None
    usage: SpeechUsage | None = None
    timestamps: list[TimedWord] | None = None
    error: ErrorBody | None = None


class BatchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The results in the order of the items. `id` is the request id; that of an item has `-` and its index added."""

    id: str
    results: list[BatchResult]
    total: int
    succeeded: int
    failed: int
    object: Literal["audio.speech.batch"] = "audio.speech.batch"


class BatchItems(msgspec.Struct, frozen=True):
    """A body as it was sent: the fields of each item, among the defaults, to be decoded one by one."""

    items: list[dict[str, Any]]


class _Outline(msgspec.Struct):
    items: msgspec.Raw = msgspec.Raw(b"null")


_OUTLINE: Final = JsonDecoder(_Outline, {})


class _BatchDecoder(JsonDecoder[BatchItems]):
    """Leaves the items undecoded: one that is wrong must not cost the others their speech."""

    def decode(self, body: bytes, content_type: str, charset: str | None = None) -> BatchItems:
        speech = SpeechJson.decoder
        outline = _OUTLINE.fields(body, content_type, charset)
        items = speech.fields_of_each(msgspec.Raw(msgspec.json.encode(outline.get("items"))))
        if items is None or not 1 <= len(items) <= MAX_ITEMS:
            raise ApiError("invalid_value", f"items: must be a list of 1 to {MAX_ITEMS} requests.", param="items")
        defaults = speech.fields(body, content_type, charset)
        return BatchItems([defaults | item for item in items])


class BatchJson(JsonBodyDto[BatchItems]):
    """The DTO of the request body."""

    decoder = _BatchDecoder(BatchItems, {})

    @classmethod
    def create_openapi_schema(
        cls, field_definition: FieldDefinition, handler_id: str, schema_creator: "SchemaCreator"
    ) -> "Reference | Schema":
        """The schema of what clients send."""
        _ = field_definition, handler_id
        return schema_creator.for_field_definition(FieldDefinition.from_annotation(SpeechBatch))


@post(
    "/speech/batch",
    dto=BatchJson,
    return_dto=None,
    status_code=200,
    operation_id="createSpeechBatch",
    summary="Speak several texts",
    tags=["Speech"],
    responses={
        200: ResponseSpec(BatchResponse, description="A result for each item.", generate_examples=False),
        **documented(400, 401, 403, 408, 413, 415, 429, 500, 503),
    },
)
async def create_speech_batch(
    request: Request[Any, Any, Any],
    data: JSONBody[BatchItems],
    *,
    starter: SpeechStarterDependency,
) -> ClosingStream:
    """1 to 32 requests over shared defaults, answered together. An item that fails does so alone, with its own error.

    `stream`, `stream_format` and `store` have no meaning here.
    """
    batch = _Batch(starter, request_id_of(request.scope))
    speaking = asyncio.create_task(batch.speak(data.items))

    def close() -> None:
        speaking.cancel()

    body = _body(request_id_of(request.scope), speaking)
    return ClosingStream(body, on_close=close, media_type="application/json", status_code=200)


class _Batch:
    """The items of one request, and the memory that they take together."""

    def __init__(self, starter: SpeechStarter, request_id: str) -> None:
        self._starter = starter
        self._request_id = request_id
        allowed = starter.caller.limits.concurrent_requests or PER_BATCH_AT_ONCE
        self._places = asyncio.Semaphore(min(PER_BATCH_AT_ONCE, allowed))
        self._held_bytes = 0

    async def speak(self, items: list[dict[str, Any]]) -> list[BatchResult]:
        """The result of each item."""
        return list(await asyncio.gather(*(self._result(index, fields) for index, fields in enumerate(items))))

    async def _result(self, index: int, fields: dict[str, Any]) -> BatchResult:
        try:
            async with self._places:
                return await self._spoken(index, SpeechJson.decoder.of_fields(fields))
        except ApiError as error:
            failure = error
        except Exception:
            log.exception("batch_item_crashed", request_id=self._request_id, index=index)
            failure = internal_error()
        return BatchResult(index=index, status="error", error=envelope(failure).error)

    async def _spoken(self, index: int, data: SpeechRequest) -> BatchResult:
        started = await self._starter.start(data, f"{self._request_id}-{index}")
        pcm_bytes = 0

        captions = started.captions()

        def hold(chunk: Chunk) -> None:
            nonlocal pcm_bytes
            pcm_bytes += len(chunk.pcm)
            self._hold(len(chunk.pcm))
            if captions is not None:
                captions.feed(chunk)

        try:
            with abort_on_failure(started.speech):
                audio, finished = await whole_body(started.speech, started.encoder(streaming=False), hold)
        except BaseException:
            self._held_bytes -= pcm_bytes
            raise
        self._held_bytes += len(audio) - pcm_bytes
        return BatchResult(
            index=index,
            status="success",
            id=speech_id_of(started.speech.id),
            audio_data=audio,
            media_type=started.media_type,
            sample_rate=started.sample_rate,
            finish_reason=finished.reason,
            usage=usage_of(finished.usage),
            timestamps=captions.rest() if captions else None,
        )

    def _hold(self, n_bytes: int) -> None:
        self._held_bytes += n_bytes
        if self._held_bytes > MAX_BATCH_BYTES:
            raise ApiError("invalid_value", "input: too much speech for one batch; send fewer items.", param="input")


async def _body(request_id: str, speaking: "asyncio.Task[list[BatchResult]]") -> AsyncIterator[bytes]:
    """The JSON of a BatchResponse, an item at a time: base64 takes a third more than the audio.

    Until all have come there is white space, which JSON allows: proxies give up after a minute of silence.
    """
    while not (await asyncio.wait({speaking}, timeout=KEEPALIVE_S))[0]:
        yield b" "
    results = speaking.result()
    succeeded = sum(result.error is None for result in results)
    whole = BatchResponse(
        id=request_id, results=[], total=len(results), succeeded=succeeded, failed=len(results) - succeeded
    )
    head, tail = _encode(whole).split(b"[]")
    yield head + b"["
    for number in range(len(results)):
        yield (b"," if number else b"") + await asyncio.to_thread(_encode, results.pop(0))
    yield b"]" + tail
