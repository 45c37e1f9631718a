"""The steps of the engines: their events go to the requests, and their errors end as few requests as possible."""

from collections.abc import Callable, Iterable
from typing import assert_never

import structlog

from gpu_worker.engines.base import Done, Event, Fault, JobError, Pcm
from gpu_worker.engines.faults import failure_of_job, is_out_of_memory, raise_if_broken
from gpu_worker.lifecycle.open_requests import OpenRequests
from gpu_worker.lifecycle.timeouts import late
from gpu_worker.requests import Request
from gpu_worker.residency import Residency
from gpu_worker.scheduling import Slots
from gpu_worker.stats import Stats

log = structlog.get_logger(__name__)


class EngineSteps:
    """Steps the engines of the resident models."""

    def __init__(
        self,
        requests: OpenRequests,
        *,
        slots: Slots,
        residency: Residency,
        stats: Stats,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._slots = slots
        self._residency = residency
        self._stats = stats
        self._clock = clock
        self._held_back: set[str] = set()  # the jobs that the last step left out
        self._retried: set[str] = set()  # models that ran out of memory: their next step is the second try

    def have_work(self) -> bool:
        """True if an engine can make a step now."""
        return bool(self._runnable(self._left_out()))

    def step(self) -> None:
        """One step of every engine that has work."""
        held_back = self._hold_back()
        for model in self._runnable(held_back):
            try:
                events = self._residency.engines[model].step(held_back)
            except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
                self.recover(model, error)
                continue
            self._retried.discard(model)
            for event in events:
                self._deliver(event)

    def retries(self, model: str) -> bool:
        """True if the next step of the model is a second try; a model without a job in a slot has no next step."""
        if not _of_model(model, self._slots.running.values()):
            self._retried.discard(model)
        return model in self._retried

    def recover(self, model: str, error: Exception) -> None:
        """An engine failed as a whole: keep the process, and as many requests as possible.

        Out of memory: evict idle models and try the step once more; then fail the youngest request.
        Nothing can be evicted while a model is on its way to the device, so the second try comes at once then.
        A broken device (a CUDA error that sticks to the process): BrokenDeviceError; a new process is needed.
        Anything else: fail the requests that this engine has; queued and later requests get a new engine.
        """
        running = _of_model(model, self._slots.running.values())
        if is_out_of_memory(error) and running:
            self._stats.out_of_memory(model)
            if model not in self._retried:
                log.warning("out_of_memory_evicting_idle_models", model=model)
                self._retried.add(model)
                self._residency.evict_idle()
                return
            youngest = max(running, key=lambda request: request.started_at or 0.0)
            log.warning("out_of_memory_failing_youngest_request", model=model, request_id=youngest.id)
            message = f"{model}: the device's memory is used up: {error}"
            self._requests.finish(youngest, JobError("insufficient_vram", message, retry_after_s=5))
            return
        log.error("engine_failed", model=model, exc_info=error)
        raise_if_broken(error)
        for request in _of_model(model, self._slots):
            message = f"{model} failed while it was speaking: {error}"
            self._requests.finish(request, JobError("synthesis_failed", message))
        self._residency.replace_engine(model)

    def _deliver(self, event: Event) -> None:
        request = self._slots.get(event.job_id)
        if request is None:
            return  # cancelled since
        match event:
            case Pcm(data=data, rate=rate, words=words):
                if request.is_late(self._clock()):  # a step of a CPU may take longer than the deadline allows
                    self._requests.finish(request, late(request))
                    return
                if request.first_audio_at is None:
                    self._stats.first_audio(request)
                self._stats.audio_made(request.model, len(data))
                request.push(data, self._clock(), rate, words)
            case Done():
                self._requests.finish(request, event)
            case Fault(error=error):
                self._requests.finish(request, error)
            case _:
                assert_never(event)

    def _hold_back(self) -> set[str]:
        """The jobs that the next step leaves out, now that it begins."""
        now, held_back = self._clock(), self._left_out()
        for job_id in held_back ^ self._held_back:
            request = self._slots.running.get(job_id)
            if request is not None:
                request.set_idle(idle=job_id in held_back, now=now)
        self._held_back = held_back
        return held_back

    def _left_out(self) -> set[str]:
        """The jobs that a step leaves out if it is the next one. Requests end here that an engine cannot judge."""
        held_back = self._slots.held_back(self._held_back, self._stepped_models())
        while self._slots.faults:
            job_id, error = self._slots.faults.popitem()
            self._fail_one(job_id, error)
        return held_back

    def _fail_one(self, job_id: str, error: Exception) -> None:
        """An engine failed at one job alone: fail its request, if that is still open."""
        request = self._slots.get(job_id)
        if request is None:
            return
        log.error("request_failed_in_engine", model=request.model, request_id=request.id, exc_info=error)
        message = f"{request.model} failed while it was speaking: {error}"
        self._requests.finish(request, failure_of_job(message, error))

    def _runnable(self, held_back: set[str]) -> list[str]:
        """The models whose engine has work."""
        return [model for model in self._stepped_models() if self._is_runnable(model, held_back)]

    def _is_runnable(self, model: str, held_back: set[str]) -> bool:
        try:
            return self._residency.engines[model].runnable(held_back)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self.recover(model, error)
            return False

    def _stepped_models(self) -> list[str]:
        """The resident models; one that ran out of memory waits while idle models are evicted."""
        waiting = self._retried if self._residency.evicting else ()
        return [model for model in self._residency.engines if model not in waiting]


def _of_model(model: str, requests: Iterable[Request]) -> list[Request]:
    return [request for request in requests if request.model == model]
