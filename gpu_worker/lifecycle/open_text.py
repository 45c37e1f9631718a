"""The text of open requests: more of it goes to the engine, within its bounds, and must not keep the engine waiting."""

from collections.abc import Callable

import structlog

from gpu_worker.engines.base import JobError
from gpu_worker.engines.faults import failure_of_job
from gpu_worker.keys import LimitCounter
from gpu_worker.lifecycle.bounds import RequestBounds
from gpu_worker.lifecycle.open_requests import OpenRequests
from gpu_worker.requests import Request, RequestState
from gpu_worker.residency import Residency
from gpu_worker.scheduling import Slots
from gpu_worker.stats import Stats
from shared.protocol import Append, EndText

log = structlog.get_logger(__name__)


class OpenText:
    """Takes text for open requests. A request that has no slot yet holds its text until `write_held`."""

    def __init__(
        self,
        requests: OpenRequests,
        *,
        slots: Slots,
        residency: Residency,
        limits: LimitCounter,
        stats: Stats,
        bounds: RequestBounds,
        clock: Callable[[], float],
    ) -> None:
        self.bounds = bounds
        self._requests = requests
        self._slots = slots
        self._residency = residency
        self._limits = limits
        self._stats = stats
        self._clock = clock

    def take(self, peer: bytes, message: Append | EndText) -> None:
        """Take the next text of a request, or its end; the request fails if its text is over a limit."""
        request = self._requests.get(peer, message.id)
        if request is None or not request.text_open:
            return
        try:
            if isinstance(message, Append):
                self._count(request, len(message.text))
        except JobError as error:
            self._stats.limit_hit(error.limit)
            self._requests.finish(request, error)
            return
        request.take_text(message, self._clock())
        if request.state in {RequestState.RUNNING, RequestState.PARKED}:
            self._write(request, message)

    def write_held(self, request: Request) -> None:
        """Give the engine what has come before the request had a slot."""
        held, request.held_text = request.held_text, []
        for message in held:
            if request.state is RequestState.RUNNING:  # still: the engine has taken what came before
                self._write(request, message)

    def cut_all(self, error: JobError) -> None:
        """End the text of all requests with a slot or parked: what has come is said, and `error` comes behind it."""
        for request in list(self._slots):
            if request.text_open:
                request.text_cut = error
                self.take(request.peer, EndText(id=request.id))

    def fail_overdue(self, now: float) -> None:
        """Fail the requests that have waited for text for too long."""
        for request in list(self._slots):
            if not request.text_open:
                continue
            if not self._slots.waits_for_text(request):
                request.waits_since = None
            elif request.waits_since is None:
                request.waits_since = now
            elif now - request.waits_since > self.bounds.open_text_timeout_s:
                reason = f"the rest of the text did not come: nothing for {self.bounds.open_text_timeout_s:.0f} s"
                self._requests.finish(request, JobError("request_timeout", reason))

    def _count(self, request: Request, characters: int) -> None:
        if request.text_chars + characters > self.bounds.max_input_chars:
            problem = f"must have at most {self.bounds.max_input_chars} characters in all its parts"
            raise JobError("invalid_value", problem, param="input")
        self._limits.add_characters(request.client, request.limits, characters)

    def _write(self, request: Request, message: Append | EndText) -> None:
        """Give the text to the engine. If that fails, the request fails, and no other one."""
        engine = self._residency.engines[request.model]
        try:
            if isinstance(message, EndText):
                engine.end_text(request.job.id)
            else:
                engine.append(request.job.id, message.text, flush=message.flush)
        except Exception as error:
            log.exception("text_rejected_by_engine", model=request.model, request_id=request.id)
            self._requests.finish(request, failure_of_job(f"{request.model} could not take the text: {error}", error))
