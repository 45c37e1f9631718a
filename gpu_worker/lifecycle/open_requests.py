"""All requests that are not DONE, and how they end.

`OpenRequests.finish` alone ends a request. It keeps queue, slots, engine and model in step with the request's state,
and reports the end to the limits and the usage of its key, to the figures and to the outcomes that are kept.
"""

from collections.abc import Callable, Iterator
from typing import assert_never

import msgspec
import structlog

from gpu_worker.engines.base import Done, JobError
from gpu_worker.keys import LimitCounter, Sums, UsageLog
from gpu_worker.requests import (
    MAX_OUTCOMES,
    Cancelled,
    Ending,
    Outcome,
    Outcomes,
    Request,
    RequestState,
    speech_error,
)
from gpu_worker.residency import Residency
from gpu_worker.scheduling import Scheduler, Slots
from gpu_worker.stats import Stats
from shared.protocol import FindSpeech, Speak, SpeechOutcome, is_known_as

log = structlog.get_logger(__name__)


class OpenRequests:
    """The requests by web worker and id. `outcomes` are those of the latest requests that have ended."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        slots: Slots,
        residency: Residency,
        limits: LimitCounter,
        usage: UsageLog,
        stats: Stats,
        clock: Callable[[], float],
        on_request_over: Callable[[Request, Ending], None],
    ) -> None:
        self.outcomes = Outcomes()
        self._requests: dict[tuple[bytes, str], Request] = {}
        self._scheduler = scheduler
        self._slots = slots
        self._residency = residency
        self._limits = limits
        self._usage = usage
        self._stats = stats
        self._clock = clock
        self._on_request_over = on_request_over

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """The requests at this moment, the oldest first; the caller may end some meanwhile."""
        return iter(list(self._requests.values()))

    def get(self, peer: bytes, request_id: str) -> Request | None:
        """The request of that web worker with that id."""
        return self._requests.get((peer, request_id))

    def add(self, request: Request) -> None:
        """A request has been queued."""
        self._requests[request.peer, request.id] = request

    def reject(self, speak: Speak, error: JobError) -> None:
        """Count a request that was not even queued, and keep its outcome."""
        self._stats.request_rejected()
        self._usage.add(speak.client, speak.model, Sums(refused=1))
        self.outcomes.record(
            SpeechOutcome(
                id=speak.id,
                client=speak.client,
                status="failed",
                model=speak.model,
                voice=speak.voice,
                error=speech_error(error),
            )
        )

    def find(self, wanted: FindSpeech) -> SpeechOutcome:
        """The outcome of a request, or its progress; JobError (`not_found`) if it is not known."""
        for request in reversed(self._requests.values()):
            if is_known_as(request.id, wanted.id) and wanted.client in ("", request.client):
                position = self._scheduler.position(request)
                return msgspec.structs.replace(request.to_outcome(), queue_position=position)
        outcome = self.outcomes.find(wanted.id, wanted.client)
        if outcome is None:
            raise JobError("not_found", f"none of the last {MAX_OUTCOMES} requests has this id")
        return outcome

    def grant_credit(self, peer: bytes, request_id: str, chunks: int) -> None:
        """The reader of a request, if it is still open, can take `chunks` more pieces of audio."""
        request = self.get(peer, request_id)
        if request is not None:
            request.grant(chunks, self._clock())
            self._forget_if_done(request, "finished")

    def finish(self, request: Request, outcome: Outcome) -> None:
        """End `request`, in whichever state it is.

        A request in the queue, in a slot or parked leaves it, and drops its reference on the model.
        Speech that is complete but not sent stays open as DRAINING; a second outcome may end that early.
        """
        if request.state in {RequestState.QUEUED, RequestState.RUNNING, RequestState.PARKED}:
            self._release(request, outcome)
        request.end(outcome, self._clock())
        match outcome:
            case Done():
                self._stats.speech_made(request)
                self._forget_if_done(request, "finished")
            case JobError():
                log.info("request_failed", request_id=request.id, model=request.model, code=outcome.code)
                self._forget_if_done(request, "failed")
            case Cancelled():
                self._forget_if_done(request, "cancelled")
            case _:
                assert_never(outcome)

    def _release(self, request: Request, outcome: Outcome) -> None:
        """Take `request` out of the queue, its slot or where it is parked, and drop its reference on the model.

        Only a request that held a slot decides how long the model stays.
        """
        self._scheduler.settle(request, request.audio_s)
        if request.state is RequestState.QUEUED:
            self._scheduler.remove(request)
            self._residency.abandon(request.model)
            return
        if not isinstance(outcome, Cancelled):
            self._scheduler.record_slot_time(request.synthesis_s(self._clock()))
        self._slots.remove(request)
        engine = self._residency.engines[request.model]
        engine.cancel(request.job.id)
        self._residency.measured(request.model, engine.memory())
        self._residency.release(request.model, request.keep_alive_s)

    def _forget_if_done(self, request: Request, ending: Ending) -> None:
        """Count a request whose last message is sent, and forget it; each request once."""
        if request.state is RequestState.DONE:
            del self._requests[request.peer, request.id]
            self._limits.end(request.client, request.limits)
            self._usage.add(request.client, request.model, _use_of(request, ending))
            self.outcomes.record(request.to_outcome())
            self._stats.request_ended(ending)
            self._on_request_over(request, ending)


def _use_of(request: Request, ending: Ending) -> Sums:
    return Sums(
        requests=1,
        characters=request.text_chars,
        audio_s=request.audio_s,
        failed=ending == "failed",
        cancelled=ending == "cancelled",
    )
