"""The queue of requests that wait for a slot: bounded, fair between clients, first come first served within a client.

Clients share the audio, not the number of requests: next is the one that has had the least (see `shares`).
Batch requests come after all others, until they have waited for a minute.
It decides which request is next and nothing else. It knows neither sockets nor tensors, neither engines nor models.
"""

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from gpu_worker.engines.base import JobError
from gpu_worker.requests import Request
from gpu_worker.scheduling.shares import AudioShares

PACE_WINDOW_S: Final = 60.0
"""The pace of the queue is that of the last minute."""

MAX_RETRY_S: Final = 60.0
"""The longest wait that an error names: the OpenAI SDK ignores a longer one."""

AUDIO_S_PER_CHARACTER: Final = 0.065
"""How long speech is expected to last; its client's account is put right at its end."""

_FIRST_SLOT_S: Final = 1.0
"""How long the first request is expected to hold its slot."""

_SMOOTHING: Final = 0.2
"""Weight of the newest request in the running mean of slot times."""


class Scheduler:
    """Requests waiting for a slot. One client with a hundred requests delays another by one of them."""

    def __init__(self, max_queue: int, clock: Callable[[], float]) -> None:
        self.max_queue = max_queue
        self._clock = clock
        self._queues: OrderedDict[str, deque[Request]] = OrderedDict()  # by client, the one whose turn it is first
        self._shares = AudioShares()
        self._mean_s: float | None = None
        self._waiting_since = 0.0  # when the queue was empty for the last time
        self._left_at: deque[float] = deque()  # when requests left the queue since then, within the last minute
        self._turned_away = 0  # clients that were refused, and for which no place has become free since

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def submit(self, request: Request, slots: int, *, free_slots: int = 0, can_start: bool = False) -> None:
        """Queue `request`; JobError `queue_full` if there is no place.

        `slots` is for the estimate in that error. A free slot counts as one more place:
        requests wait while slots are free if their model is on its way to the device.
        With `can_start` the request is about to leave the queue, and needs no place.
        """
        waiting = len(self)
        if waiting >= self.max_queue + free_slots and not can_start:
            # No more clients than the queue is long: a client that asks without a pause must not raise the estimate.
            self._turned_away = min(self._turned_away + 1, max(1, self.max_queue))
            wait_s = self.estimated_wait_s(self._turned_away, slots)
            before = "1 request is" if waiting == 1 else f"{waiting} requests are"
            message = f"{before} waiting already; a place may be free in about {math.ceil(wait_s)} s"
            error = JobError("queue_full", f"the queue is full: {message}", retry_after_s=wait_s)
            error.limit = "queue"
            raise error
        if not self._queues:
            self._waiting_since = self._clock()
            self._left_at.clear()
            self._turned_away = 0
        if request.client not in self._queues:
            self._shares.join(request.client)
        self._queues.setdefault(request.client, deque()).append(request)

    def put_back(self, request: Request) -> None:
        """Queue a request that `next` took out in front of all others."""
        self.settle(request, 0.0)
        self._queues.setdefault(request.client, deque()).appendleft(request)
        self._queues.move_to_end(request.client, last=False)
        self._left_at.pop()

    def next(self, admissible: Callable[[str, bool], bool]) -> Request | None:
        """Take out the request to start now, or None.

        `admissible(model, yields)`: whether the model has a slot for a request, or for one that yields to others.
        A request for a model without a slot holds up no request for another model.
        """
        now = self._clock()
        refused: set[tuple[str, bool]] = set()
        for client in sorted(self._queues, key=lambda client: self._rank(self._queues[client][0])):
            for request in self._queues[client]:
                kind = request.model, request.yields(now)
                if kind in refused:
                    continue
                if not admissible(*kind):
                    refused.add(kind)
                    continue
                self.remove(request)
                request.charged_s = expected_audio_s(request)
                self._shares.serve(client, request.charged_s)
                if client in self._queues:
                    self._queues.move_to_end(client)
                return request
        return None

    def position(self, request: Request) -> int | None:
        """The place of `request` in the queue, from 1 on, if every model has slots; None if it is not queued."""
        if request not in self._queues.get(request.client, ()):
            return None
        waiting = {client: deque(queue) for client, queue in self._queues.items()}
        turns = itertools.count()
        heap = [(*self._rank(queue[0]), next(turns), client) for client, queue in waiting.items()]
        heapq.heapify(heap)
        for place in itertools.count(1):
            _, clock, _, client = heapq.heappop(heap)
            first = waiting[client].popleft()
            if first is request:
                return place
            if waiting[client]:
                rank = waiting[client][0].yields(self._clock()), clock + expected_audio_s(first)
                heapq.heappush(heap, (*rank, next(turns), client))
        return None

    def settle(self, request: Request, audio_s: float) -> None:
        """A request that `next` gave has ended, with so much audio: its client is charged for that."""
        self._shares.charge(request.client, audio_s - request.charged_s)
        request.charged_s = audio_s

    def _rank(self, request: Request) -> tuple[bool, float]:
        """The lowest is next; of equal ones, the client that was served longest ago."""
        return request.yields(self._clock()), self._shares[request.client]

    def remove(self, request: Request) -> None:
        """Take out `request`; no effect if it is not queued."""
        queue = self._queues.get(request.client, deque())
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._queues[request.client]
            self._left_at.append(self._clock())
            self._turned_away = max(0, self._turned_away - 1)

    def record_slot_time(self, seconds: float) -> None:
        """A request held its slot for so long: the base of estimates until the queue has shown its own pace."""
        before = seconds if self._mean_s is None else self._mean_s
        self._mean_s = before + _SMOOTHING * (seconds - before)

    def estimated_wait_s(self, places: int, slots: int) -> float:
        """Roughly how many seconds pass until so many places of the queue have become free.

        The pace is the one at which requests left the queue within the last minute.
        The mean time in a slot counts as one more departure, so that a queue that has just begun has a pace too.
        """
        now = self._clock()
        since = max(self._waiting_since, now - PACE_WINDOW_S)
        while self._left_at and self._left_at[0] < since:
            self._left_at.popleft()
        mean_s = _FIRST_SLOT_S if self._mean_s is None else self._mean_s
        interval_s = (now - since + mean_s / max(1, slots)) / (len(self._left_at) + 1)
        return min(max(1.0, interval_s * places), MAX_RETRY_S)


def expected_audio_s(request: Request) -> float:
    """How long the speech of a request may be, in seconds."""
    return AUDIO_S_PER_CHARACTER * sum(len(segment.text) for segment in request.job.segments)
