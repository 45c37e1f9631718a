"""One Speak over the replicas: it is tried elsewhere while that costs the client nothing."""

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from server.engine.client import Speech, error_of
from server.engine.outage import unavailable_error
from server.engine.ray.interface import ELSEWHERE, EngineReplicas, ReplicaLostError, ReplicaStream
from server.http.errors import ApiError, internal_error
from shared.protocol import (
    Append,
    Audio,
    Cancel,
    Credit,
    EndText,
    Failed,
    Finished,
    FromWorker,
    Message,
    ProtocolError,
    Speak,
    SpeechError,
    Started,
    decode_from_worker,
    encode,
)

log = structlog.get_logger(__name__)

_MAX_KEPT_TEXT: Final = 65_536
"""Characters of an open request that are kept for another replica, in case the first one refuses the request."""


class RelayedStream:
    """One Speak on its way through the replicas, until one of them has taken it."""

    def __init__(
        self,
        request: Speak,
        replicas: EngineReplicas,
        *,
        ingress: str,
        post: Callable[[str, Message], None],
        on_failed: Callable[[str, ApiError], None],
        on_end: Callable[[], None],
        start_timeout_s: float | None = None,
    ) -> None:
        """`post` sends a message to a replica, `on_failed` gets the replica and error of each failed attempt.

        `start_timeout_s`: how long the request may wait for a replica that takes it; None: for ever.
        """
        self._request = request
        self.speech = Speech(request, grant=self._grant, abort=self._abort, write=self._write)
        self._replicas = replicas
        self._ingress = ingress
        self._post = post
        self._on_failed = on_failed
        self._on_end = on_end
        self._start_timeout_s = start_timeout_s
        self._replica = ""
        """The one that has the request; "" while it is being chosen."""
        self._written: list[Append | EndText] = []
        """The text of an open request for another replica, kept while this one may still refuse the request."""
        self._kept_chars = 0
        self._begun = False
        self._over = False
        self._lost: ApiError | None = None
        """Set when the replica lacks a message: without its text, the speech would have a hole."""
        self._answers: ReplicaStream | None = None
        self._cancel: Cancel | None = None

    @property
    def replica(self) -> str:
        """The one that has the request; "" while no replica has it."""
        return self._replica

    async def run(self, reference: bytes | None) -> None:
        """Pass the messages on to the speech. A refusal, or a loss before the first sound, is tried elsewhere."""
        avoid: list[str] = []
        try:
            error = None
            while not self._over and (error := await self._attempt(reference, avoid)) is not None:
                self._on_failed(self._replica, error)
                if self._over or not self._may_move(error, avoid):
                    break
                avoid.append(self._replica)
                self._replica = ""
                self._lost = None
            if error is not None and not self._over:
                self.speech.fail(error)
        finally:
            if not self._over:
                self.speech.fail(internal_error())  # unless it has failed already
                if self._answers is not None:
                    self._answers.cancel()
            self._over = True
            self._on_end()

    def _may_move(self, error: ApiError, avoid: list[str]) -> bool:
        if self._begun or error.code not in ELSEWHERE or self._kept_chars > _MAX_KEPT_TEXT:
            return False
        if self._replica in {"", *avoid}:  # none other is to have the model
            return False
        return bool({*self._replicas.ids()} - {*avoid, self._replica})

    async def _attempt(self, reference: bytes | None, avoid: list[str]) -> ApiError | None:
        """Let one replica speak; None when the speech is complete, else why it failed."""
        request = encode(self._request)[0]
        try:
            answers = self._answers = self._replicas.speak(
                request, reference, ingress=self._ingress, model=self._request.model, avoid=avoid
            )
            async with asyncio.timeout(self._start_timeout_s) as limit:
                return await self._listen(answers, limit)
        except TimeoutError:
            if self._answers is not None:
                self._answers.cancel()
            return unavailable_error(f"No GPU worker has started within {self._start_timeout_s:.0f} s.")
        except ReplicaLostError as lost:
            log.warning("replica_lost", replica=self._replica, reason=str(lost))
            return unavailable_error("The GPU worker went away.")
        except ProtocolError as error:
            return ApiError("synthesis_failed", f"The GPU worker's answer was {error}.")

    async def _listen(self, answers: ReplicaStream, limit: asyncio.Timeout) -> ApiError | None:
        """Take the answers of one replica; the first one ends the limit."""
        async for batch in answers:
            limit.reschedule(None)
            if self._lost is not None:
                break
            if not self._replica:
                (name,) = batch.pop(0)
                self._chosen(name.decode())
            for frames in batch:
                message, payload = decode_from_worker(frames)
                if isinstance(message, Failed):
                    return error_of(message)
                problem = self._receive(message, payload)
                if problem is not None:
                    self.speech.abort(ApiError("synthesis_failed", problem))
                if isinstance(message, Finished):
                    self._over = True
                    return None
        return self._lost or ApiError("synthesis_failed", "The GPU worker sent no final message.")

    def lose(self, replica: str) -> None:
        """The replica lacks a message of the request, so the request ends there."""
        if replica == self._replica and self._answers is not None and not self._over:
            self._lost = unavailable_error("The GPU worker did not take all messages.")
            self._answers.cancel()

    def _receive(self, message: FromWorker, payload: bytes | None) -> str | None:
        if isinstance(message, Started | Audio | Finished) and not self._over:
            self._begun = True
            self._written.clear()
            return self.speech.receive(message, payload)
        return None

    def _chosen(self, replica: str) -> None:
        self._replica = replica
        for message in [self._cancel] if self._cancel else self._written:
            self._post(replica, message)

    def _write(self, message: Append | EndText) -> None:
        # Before a replica is chosen there is nowhere else to keep them.
        if not self._replica or (not self._begun and self._kept_chars <= _MAX_KEPT_TEXT):
            self._written.append(message)
            self._kept_chars += len(message.text) if isinstance(message, Append) else 0
        if self._replica:
            self._post(self._replica, message)

    def _grant(self, request_id: str, chunks: int) -> None:
        self._post(self._replica, Credit(id=request_id, chunks=chunks))

    def _abort(self, request_id: str, error: ApiError | None) -> None:
        if not self._over:
            self.speech.fail(error or ApiError("synthesis_failed", "The request was aborted."))
            self._over = True
            self._on_end()
        reason = SpeechError(code=error.code, message=error.message, param=error.param) if error else None
        self._cancel = Cancel(id=request_id, error=reason)
        if self._replica:
            self._post(self._replica, self._cancel)
        elif self._answers is not None:
            self._answers.cancel()
