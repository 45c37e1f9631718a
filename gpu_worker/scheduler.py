"""The queue of requests that wait for a slot: bounded, fair between clients, first come first served within a client.

It decides which request is next and nothing else. It knows neither sockets nor tensors, neither engines nor models.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from gpu_worker.engines.base import JobError
from gpu_worker.requests import Request

_SMOOTHING: Final = 0.2
"""Weight of the newest request in the running mean of slot times."""


class Scheduler:
    """Requests waiting for a slot. Clients take turns: one with a hundred requests delays another by one of them."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._queues: OrderedDict[str, deque[Request]] = OrderedDict()  # by client, the one whose turn it is first
        self._mean_s = 1.0

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def submit(self, request: Request, slots: int) -> None:
        """Queue `request`; JobError `queue_full` if there is no place. `slots` is for the estimate in that error."""
        waiting = len(self)
        if waiting >= self._max_queue:
            wait_s = self.estimated_wait_s(waiting, slots)
            before = "1 request is" if waiting == 1 else f"{waiting} requests are"
            message = f"{before} waiting already; a place may be free in about {math.ceil(wait_s)} s"
            raise JobError("queue_full", f"the queue is full: {message}", retry_after_s=wait_s)
        self._queues.setdefault(request.client, deque()).append(request)

    def put_back(self, request: Request) -> None:
        """Queue a request that `next` took out in front of all others."""
        self._queues.setdefault(request.client, deque()).appendleft(request)
        self._queues.move_to_end(request.client, last=False)

    def next(self, admissible: Callable[[str], bool]) -> Request | None:
        """Take out the request to start now, or None. `admissible(model)`: whether the model has a free slot.

        The client of that request goes to the end of the turns.
        A request for a model without a free slot holds up no request for another model.
        """
        refused: set[str] = set()
        for client, queue in self._queues.items():
            for request in queue:
                if request.model in refused:
                    continue
                if not admissible(request.model):
                    refused.add(request.model)
                    continue
                self.remove(request)
                if client in self._queues:
                    self._queues.move_to_end(client)
                return request
        return None

    def remove(self, request: Request) -> None:
        """Take out `request`; no effect if it is not queued."""
        queue = self._queues.get(request.client, deque())
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._queues[request.client]

    def record_slot_time(self, seconds: float) -> None:
        """A request held its slot for so long: the base of the next estimate."""
        self._mean_s += _SMOOTHING * (seconds - self._mean_s)

    def estimated_wait_s(self, ahead: int, slots: int) -> float:
        """Roughly how many seconds a request waits behind `ahead` others."""
        return max(1.0, self._mean_s * (ahead + 1) / max(1, slots))
