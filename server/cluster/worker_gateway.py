"""A replica's relay: messages of the web processes go to its GPU worker, and the answers back.

`WorkerGateway` knows streams and credit. It does not know ray: replica.py calls it from a Serve deployment.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import Final, TypeVar

import msgspec
import structlog

from server.cluster.ingress_leases import IngressLeases
from server.engine import ReplicaReport, Speech, ZmqEngineClient
from server.engine.ray import Frames, ReportRequest
from server.http.errors import ApiError
from shared.pcm import SAMPLE_RATE
from shared.protocol import (
    Append,
    Audio,
    Call,
    Cancel,
    Credit,
    EndText,
    Failed,
    Message,
    ProtocolError,
    Speak,
    SpeechError,
    Spoken,
    Started,
    UsedElsewhere,
    decode_from_web,
    encode,
)

log = structlog.get_logger(__name__)

M = TypeVar("M", bound=Message)

_CALL_TIMEOUT_S: Final = 3600.0
"""The web process has a limit of its own, and cancels the call after it."""


class WorkerGateway:
    """One replica's side of the conversation. All methods run on the event loop of `engine`."""

    def __init__(
        self,
        name: str,
        engine: ZmqEngineClient,
        leases: IngressLeases,
        *,
        node: str = "",
        gpus: list[str] | None = None,
    ) -> None:
        self.name = name
        self._engine = engine
        self._node = node
        self._gpus = gpus or []
        self._leases = leases
        self._streams: dict[str, _Stream] = {}

    @property
    def streams(self) -> int:
        """The number of requests in progress."""
        return len(self._streams)

    async def speak(self, header: bytes, reference: bytes | None, ingress: str) -> AsyncIterator[list[Frames]]:
        """Speak a request: batches of messages, of which the first begins with this replica's name."""
        first: Frames = [self.name.encode()]
        try:
            request = _decode(header, reference, Speak)
            speech = self._engine.speak(request, reference, relayed=True)
        except ApiError as error:
            yield [first, encode(failed("", error))]
            return
        stream = self._streams[request.id] = _Stream(request, speech, ingress)
        try:
            yield [first]
            async for batch in stream.batches():
                yield batch
        finally:
            del self._streams[request.id]
            if speech.finished is None:
                speech.abort()

    async def call(self, header: bytes, payload: bytes | None) -> Frames:
        """Do an action; the answer is a Reply or a Failed."""
        try:
            call = _decode(header, payload, Call)
            reply = await self._engine.call(
                call.action, client=call.client, access=call.access, payload=payload, timeout_s=_CALL_TIMEOUT_S
            )
        except ApiError as error:
            return encode(failed("", error))
        return encode(msgspec.structs.replace(reply, id=call.id))

    def post(self, messages: list[bytes]) -> None:
        """Take messages that have no answer, in their order."""
        for header in messages:
            try:
                message, _ = decode_from_web([header])
            except ProtocolError as error:
                log.warning("message_invalid", error=str(error))
                continue
            match message:
                case Spoken():
                    self._engine.record(message.outcome)
                case Credit() | Cancel() | Append() | EndText():
                    self._pass_on(message)

    def _pass_on(self, message: Credit | Cancel | Append | EndText) -> None:
        stream = self._streams.get(message.id)
        match message:
            case Cancel(error=reason):
                error = ApiError(reason.code, reason.message, param=reason.param) if reason else None
                if stream is None:
                    self._engine.cancel(message.id, error)
                else:
                    stream.speech.abort(error)
            case _ if stream is None:
                pass  # it ended a moment ago
            case Credit(chunks=chunks):
                self._engine.grant(message.id, chunks)
            case Append(text=text, flush=flush):
                stream.speech.append(text, flush=flush)
            case EndText():
                stream.speech.end_text()

    async def report(self, request: bytes) -> bytes:
        """The status of the replica, in return for which the ingress renews its lease."""
        asked = msgspec.msgpack.decode(request, type=ReportRequest)
        self._leases.renew(asked.ingress, asked.ping)
        if asked.ingress == self._leases.usage_source():
            self._engine.tell_use(UsedElsewhere(source=asked.ingress, clients=asked.used_elsewhere))
        if asked.fresh:
            with contextlib.suppress(ApiError):  # the report has the error
                await self._engine.fresh_snapshot(0)
        return msgspec.msgpack.encode(self.status(asked.boot_id))

    def end_leases(self) -> None:
        """Abort the streams of web processes that are gone. Call it every few seconds."""
        gone = self._leases.end()
        for stream in [stream for stream in self._streams.values() if stream.ingress in gone]:
            stream.speech.abort()

    def abort_all(self) -> None:
        """Break every stream, because this replica ends."""
        for stream in list(self._streams.values()):
            stream.speech.abort(ApiError("shutting_down", "The GPU worker is being replaced."))

    def status(self, known_boot_id: str = "") -> ReplicaReport:
        """The report; it has the catalogue unless `known_boot_id` is that of the worker."""
        error = self._engine.unavailable()
        snapshot = self._engine.snapshot
        report = ReplicaReport(replica=self.name, node=self._node, gpus=self._gpus, snapshot=snapshot)
        if error is not None:
            reason = SpeechError(code=error.code, message=error.message)
            report = msgspec.structs.replace(report, error=reason, retry_after_s=error.retry_after_s)
        if snapshot is not None:
            age_s = self._engine.snapshot_age_s
            report = msgspec.structs.replace(report, boot_id=snapshot.boot_id, age_s=age_s)
            if snapshot.boot_id != known_boot_id:
                settings = self._engine.worker_settings
                report = msgspec.structs.replace(report, catalog=self._engine.catalog, settings=settings)
        return report


class _Stream:
    """One request. The web process grants the credit, so no more of it waits here than there is credit for."""

    def __init__(self, request: Speak, speech: Speech, ingress: str) -> None:
        self.speech = speech
        self.ingress = ingress
        self._request = request

    async def batches(self) -> AsyncIterator[list[Frames]]:
        """The messages, as many at a time as there are."""
        seq = 0
        batch: list[Frames] = []
        try:
            while (chunk := await self.speech.chunk()) is not None:
                if not seq:
                    batch.append(encode(self._started()))
                batch.append(encode(Audio(id=self._request.id, seq=seq, rate=chunk.rate, words=chunk.words), chunk.pcm))
                seq += 1
                if not self.speech.ready and self.speech.finished is None:
                    yield batch
                    batch = []
        except ApiError as error:
            yield [*batch, encode(failed(self._request.id, error))]
            return
        if self.speech.finished is not None:
            yield [*batch, encode(self.speech.finished)]

    def _started(self) -> Started:
        return Started(
            id=self._request.id,
            model=self._request.model,
            sample_rate=SAMPLE_RATE,
            rate_limit=self.speech.rate_limit,
        )


def failed(request_id: str, error: ApiError) -> Failed:
    """The message of an error."""
    return Failed(
        id=request_id,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        rate_limit=error.rate_limit,
    )


def _decode(header: bytes, payload: bytes | None, kind: type[M]) -> M:
    """The message; ApiError if it is none of its kind."""
    try:
        message, _ = decode_from_web([header] if payload is None else [header, payload])
    except ProtocolError as error:
        raise ApiError("internal_error", f"The web process sent {error}.") from None
    if not isinstance(message, kind):
        raise ApiError("internal_error", f"The web process sent no {kind.__name__}.")
    return message
