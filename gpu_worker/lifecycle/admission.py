"""Admission: requests enter the queue, get a slot, leave it for another request and come back to one.

`scheduling` decides which request gets a slot and which one leaves it; Admission asks the engines to do it.
"""

from collections.abc import Callable
from typing import Final

import structlog

from gpu_worker.engines.base import JobError
from gpu_worker.engines.faults import failure_of_job, is_out_of_memory
from gpu_worker.keys import LimitCounter
from gpu_worker.lifecycle.engine_steps import EngineSteps
from gpu_worker.lifecycle.open_requests import OpenRequests
from gpu_worker.lifecycle.open_text import OpenText
from gpu_worker.requests import Request
from gpu_worker.residency import Residency
from gpu_worker.scheduling import NEWCOMERS_IN_A_ROW, Place, Scheduler, Slots
from gpu_worker.stats import Stats

UNKNOWN_SLOTS: Final = 8
"""The slots of a model that has not been resident yet: a model has as many on a CPU, and seldom fewer on a GPU."""

log = structlog.get_logger(__name__)


class Admission:
    """Queues requests and gives them slots."""

    def __init__(
        self,
        requests: OpenRequests,
        *,
        scheduler: Scheduler,
        slots: Slots,
        residency: Residency,
        steps: EngineSteps,
        open_text: OpenText,
        limits: LimitCounter,
        stats: Stats,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._scheduler = scheduler
        self._slots = slots
        self._residency = residency
        self._steps = steps
        self._open_text = open_text
        self._limits = limits
        self._stats = stats
        self._clock = clock
        self._newcomers_in_a_row = 0
        self._slots_of: dict[str, int] = {}  # by model, as many as it had when it became resident

    def queue(self, request: Request) -> None:
        """Queue a request and ask for its model; JobError if it cannot be queued."""
        if self._requests.get(request.peer, request.id) is not None:
            raise JobError("invalid_value", f"there is a request {request.id!r} already")
        characters = sum(len(segment.text) for segment in request.job.segments)
        can_start = self._can_start(request.model, request.yields(self._clock()))
        free_slots = self._slots.free(request.model, unknown=self._slots_of.get(request.model, UNKNOWN_SLOTS))
        try:
            self._limits.check(request.client, request.limits, characters)
            self._scheduler.submit(request, len(self._slots), free_slots=free_slots, can_start=can_start)
        except JobError as error:
            error.rate_limit = self._limits.left(request.client, request.limits)
            self._stats.limit_hit(error.limit)
            raise
        request.rate_limit = self._limits.count(request.client, request.limits, characters)
        self._requests.add(request)
        self._residency.acquire(request.model)

    def on_model_ready(self, model: str) -> None:
        """The queued requests of a model that has become resident wait for a slot from now on."""
        self._slots_of[model] = self._residency.engines[model].capacity()
        for request in self._scheduler:
            if request.model == model:
                request.model_ready_at = self._clock()

    def give_slots(self) -> None:
        """Give a slot to every request that can have one.

        After NEWCOMERS_IN_A_ROW newcomers comes a parked request that runs dry.
        The rest of the free slots go to other parked requests.
        """
        self._slots.out_of_room = False
        while self._start_or_unpark() or self._unpark_next(hungry=False):
            pass

    def _start_or_unpark(self) -> bool:
        """Give one slot to a newcomer or to a hungry parked request; False if neither can have one."""
        newcomers_first = self._newcomers_in_a_row < NEWCOMERS_IN_A_ROW
        if newcomers_first and self._start_next():
            self._newcomers_in_a_row += 1
            return True
        if self._unpark_next(hungry=True, its_turn=not newcomers_first):
            self._newcomers_in_a_row = 0
            return True
        return not newcomers_first and self._start_next()

    def _start_next(self) -> bool:
        request = self._scheduler.next(self._can_start)
        if request is None:
            return False
        # Asked again, because time has passed: a request that was ahead enough to be parked may not be any more.
        place = self._slots.place_for_newcomer(request.model, yields=request.yields(self._clock()))
        if place is None or not self._vacate(place):
            self._scheduler.put_back(request)
            return False
        try:
            self._residency.engines[request.model].admit(request.job)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self._on_refused(request, error)
        else:
            self._slots.running[request.job.id] = request
            self._stats.request_started(request)
            request.start(self._clock())
            self._open_text.write_held(request)
        return True

    def _unpark_next(self, *, hungry: bool, its_turn: bool = False) -> bool:
        """Put the parked request with the least audio in hand into a slot; with `hungry`, only if it runs dry.

        `its_turn`: newcomers went before it.
        """
        models = [model for model in self._residency.engines if self._takes_jobs(model)]
        if not hungry:
            models = [model for model in models if self._slots.has_spare(model)]
        request = self._slots.next_parked(models)
        if request is None or (hungry and not self._slots.is_hungry(request)):
            return False
        place = self._slots.place_for_parked(request, its_turn=its_turn)
        if place is None or not self._vacate(place):
            return False
        try:
            self._residency.engines[request.model].unpark(request.job.id)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self._steps.recover(request.model, error)
            return False
        del self._slots.parked[request.job.id]
        self._slots.running[request.job.id] = request
        request.unpark(self._clock())
        return True

    def _vacate(self, place: Place) -> bool:
        """Park the request that holds `place`, if there is one; False if it could not be parked."""
        request = place.parks
        if request is None:
            return True
        try:
            parked_bytes = self._residency.engines[request.model].park(request.job.id)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            if is_out_of_memory(error):
                log.warning("no_host_ram_to_park", model=request.model, request_id=request.id)
                self._slots.stop_parking()
            else:
                self._steps.recover(request.model, error)
            return False
        del self._slots.running[request.job.id]
        self._slots.parked[request.job.id] = request
        request.park(parked_bytes, self._clock())
        return True

    def _takes_jobs(self, model: str) -> bool:
        """True if the model's engine may take a job into a slot, if there is one.

        While memory is being freed for a step, a job would take that memory.
        """
        return model in self._residency.engines and not self._steps.retries(model) and not self._residency.evicting

    def _can_start(self, model: str, yields: bool) -> bool:  # noqa: FBT001 -- as the scheduler asks
        return self._takes_jobs(model) and self._slots.place_for_newcomer(model, yields=yields) is not None

    def _on_refused(self, request: Request, error: Exception) -> None:
        """The engine did not take the job. Out of memory: evict idle models, and try the request once more."""
        if isinstance(error, JobError):
            self._requests.finish(request, error)
            return
        message = f"{request.model} could not take the request: {error}"
        if is_out_of_memory(error):
            self._stats.out_of_memory(request.model)
            if request.retried:
                self._requests.finish(request, failure_of_job(message, error))
                return
            log.warning("out_of_memory_evicting_idle_models", model=request.model)
            request.retried = True
            self._residency.evict_idle()
            self._scheduler.put_back(request)
            return
        log.error("request_rejected_by_engine", model=request.model, request_id=request.id, exc_info=error)
        self._requests.finish(request, failure_of_job(message, error))
