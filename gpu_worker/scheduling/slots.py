"""The requests that hold a slot and those that are parked: which of them change places, and which make no audio now.

It joins the rules of `slot_policy` and `requests.audio_buffer` with the engines' slots.
It asks engines for their figures alone: the Worker parks, unparks and steps.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final

import msgspec

from gpu_worker.engines.base import Engine
from gpu_worker.requests import STALLED_AFTER_S, AudioBuffer, Request, may_grow, may_park
from gpu_worker.scheduling.slot_policy import Holding, next_to_park, next_to_unpark, next_to_wait

NO_PARKING_S: Final = 1.0
"""How long nothing is parked after host RAM ran out."""


class Place(msgspec.Struct, frozen=True):
    """A slot that can be given. `parks` is the request that is parked for it; None if the slot is free."""

    parks: Request | None = None


class Slots:
    """The slots of all engines. `engines` gives those of the resident models, by model.

    `out_of_room` becomes true if a request could have had a slot, had the buffer been emptier; the Worker clears it.
    `faults` are the errors that engines raised when they were asked about a job, by its id; the Worker takes them.
    """

    def __init__(
        self,
        engines: Callable[[], Mapping[str, Engine]],
        buffer: AudioBuffer,
        *,
        max_concurrency: int,
        clock: Callable[[], float],
    ) -> None:
        self._engines = engines
        self._max_concurrency = max_concurrency
        self._clock = clock
        self.buffer = buffer
        self.running: dict[str, Request] = {}  # by job id
        self.parked: dict[str, Request] = {}  # by job id, those first that were parked first
        self.out_of_room = False
        self.faults: dict[str, Exception] = {}
        self._parks_again_at = -math.inf

    def __len__(self) -> int:
        """How many requests can hold a slot at once, going by the resident engines; without one, the maximum."""
        engines = self._engines()
        slots = sum(engine.capacity() for engine in engines.values()) + len(self.running)
        return min(self._max_concurrency, slots) if engines else self._max_concurrency

    def free(self, model: str, *, unknown: int) -> int:
        """How many more requests of the model can hold a slot; `unknown` is how many its engine has, if it has none."""
        engine = self._engines().get(model)
        return min(unknown if engine is None else engine.capacity(), self._max_concurrency - len(self.running))

    def has_spare(self, model: str) -> bool:
        """True if a request that does not run dry could have a slot: a free one, or that of a request without text."""
        return self.free(model, unknown=0) > 0 or any(self.waits_for_text(request) for request in self.running.values())

    def __iter__(self) -> Iterator[Request]:
        """The requests that are running or parked."""
        yield from self.running.values()
        yield from self.parked.values()

    def get(self, job_id: str) -> Request | None:
        """The running or parked request with that job."""
        return self.running.get(job_id) or self.parked.get(job_id)

    def remove(self, request: Request) -> None:
        """The request has ended."""
        self.running.pop(request.job.id, None)
        self.parked.pop(request.job.id, None)

    def stop_parking(self) -> None:
        """Host RAM has run out: park nothing for NO_PARKING_S."""
        self._parks_again_at = self._clock() + NO_PARKING_S

    def free_bytes(self) -> int:
        """Bytes of the buffer that are neither used nor set aside; negative for a moment if readers stop."""
        set_aside = sum(self.buffer.set_aside(request.sink.waiting_bytes) for request in self.running.values())
        return self.buffer.budget_bytes - self.buffer.used_bytes - set_aside

    def place_for_newcomer(self, model: str, *, yields: bool = False) -> Place | None:
        """The place where a request of the queue can start; None if it has to wait. `yields`: it is a batch request."""
        return self._place(model, None, self.buffer.set_aside(0), yields=yields)

    def place_for_parked(self, request: Request, *, its_turn: bool) -> Place | None:
        """The place where a parked request can go on; None if there is none. `its_turn`: newcomers went before it."""
        if not self._may_grow(request, self.free_bytes()):
            return None
        needed_bytes = self.buffer.set_aside(request.sink.waiting_bytes) - request.parked_bytes
        return self._place(request.model, request, needed_bytes, its_turn=its_turn)

    def next_parked(self, models: Iterable[str]) -> Request | None:
        """The parked request of one of `models` that comes back first."""
        now = self._clock()
        holdings = [self._holding(request, now) for request in self.parked.values() if request.model in models]
        chosen = next_to_unpark(holding for holding in holdings if not holding.waits_for_text)
        return None if chosen is None else self.parked[chosen.job_id]

    def held_back(self, waited: Collection[str], models: Collection[str]) -> set[str]:
        """The jobs with a slot that the next step leaves out; `waited` are those that the step before it left out.

        `models` are those whose engines take a step.

        They have enough in the buffer, or wait for text, or a newcomer is to make its first audio.
        """
        free_bytes = self.free_bytes()
        held_back = {
            job_id
            for job_id, request in self.running.items()
            if not self._may_grow(request, free_bytes) or self.waits_for_text(request)
        }
        if self._newcomer_can_speak(models):
            now = self._clock()
            held_back.update(next_to_wait([self._holding(request, now) for request in self.running.values()], waited))
        return held_back

    def waits_for_text(self, request: Request) -> bool:
        """True if the running or parked request is an open one that can go on only with more text.

        An engine looks at the text to answer. If that fails, the request waits, and its error is in `faults`.
        """
        if not request.job.open:
            return False
        try:
            return self._engines()[request.model].waits_for_text(request.job.id)
        except Exception as error:  # noqa: BLE001 -- no error of an engine may end the service
            self.faults[request.job.id] = error
            return True

    def is_hungry(self, request: Request) -> bool:
        """True if the listener of the running or parked request will soon have nothing to hear."""
        return self._holding(request, self._clock()).is_hungry

    def longest_stalled(self, requests: Iterable[Request]) -> Request | None:
        """The stalled request that has been so for the longest time; one with a slot before all others."""
        now = self._clock()
        stalled = [request for request in requests if request.unread_s(now) > STALLED_AFTER_S]
        with_slot = [request for request in stalled if request.job.id in self.running]
        return max(with_slot or stalled, key=lambda request: request.unread_s(now), default=None)

    def _in_hand_of_parked(self, model: str, now: float) -> Iterator[float]:
        """The seconds in hand of the model's parked requests that could go on and have a listener."""
        for request in self.parked.values():
            if request.model == model and not self.waits_for_text(request) and not request.yields(now):
                yield request.in_hand_s(now)

    def _newcomer_can_speak(self, models: Collection[str]) -> bool:
        """True if a step can bring a request nearer to its first audio, and sooner without the others."""
        engines = self._engines()
        for job_id, request in self.running.items():
            if request.first_audio_at is not None or request.model not in models:
                continue
            if _is_faster_alone(engines[request.model], self.running.keys() - {job_id}):
                return True
        return False

    def _place(
        self,
        model: str,
        waiting: Request | None,
        needed_bytes: int,
        *,
        yields: bool = False,
        its_turn: bool = False,
    ) -> Place | None:
        """A slot of `model` for the parked request `waiting`, or for a newcomer. It takes `needed_bytes` of buffer."""
        free_bytes, capacity = self.free_bytes(), self._engines()[model].capacity()
        if len(self.running) < self._max_concurrency and capacity > 0:
            self.out_of_room |= needed_bytes > free_bytes
            return Place() if needed_bytes <= free_bytes else None
        now = self._clock()
        if now < self._parks_again_at:
            return None
        of_any_model = capacity > 0
        able = [request for request in self.running.values() if of_any_model or request.model == model]
        holding = None if waiting is None else self._holding(waiting, now)
        parked = self._in_hand_of_parked(model, now) if waiting is None else ()
        least_parked_s = min(parked, default=math.inf)
        while chosen := next_to_park(
            [self._holding(request, now) for request in able],
            holding,
            yields=yields,
            least_parked_s=least_parked_s,
            its_turn=its_turn,
        ):
            request = self.running[chosen.job_id]
            parked_bytes = self._park_bytes(request)
            gained_bytes = self.buffer.set_aside(request.sink.waiting_bytes)
            if may_park(parked_bytes, free_bytes) and needed_bytes + parked_bytes - gained_bytes <= free_bytes:
                return Place(parks=request)
            self.out_of_room = True
            able.remove(request)
        return None

    def _holding(self, request: Request, now: float) -> Holding:
        return Holding(
            request.job.id,
            in_hand_s=request.in_hand_s(now),
            slice_s=request.slice_s(now),
            has_spoken=request.first_audio_at is not None,
            waits_for_text=self.waits_for_text(request),
            yields=request.yields(now),
        )

    def _may_grow(self, request: Request, free_bytes: int) -> bool:
        waiting_bytes = request.sink.waiting_bytes
        if may_grow(waiting_bytes, free_bytes, in_utterance=False):
            return True
        in_utterance = (request.parked_bytes or self._park_bytes(request)) > 0
        return may_grow(waiting_bytes, free_bytes, in_utterance=in_utterance)

    def _park_bytes(self, request: Request) -> int:
        return self._engines()[request.model].park_bytes(request.job.id)


def _is_faster_alone(engine: Engine, others: Collection[str]) -> bool:
    """True if the engine can make a step without `others`, in less time."""
    try:
        return engine.is_faster_alone() and engine.runnable(others)
    except Exception:  # noqa: BLE001 -- `runnable` is asked again before the step, where its error counts
        return False
