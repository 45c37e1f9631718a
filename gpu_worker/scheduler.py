"""The queue of requests that wait for a slot: bounded, fair between clients, first come first served within one.

It decides who is next and nothing else; it knows neither sockets nor tensors nor what a request is made of.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final, Generic, Protocol, TypeVar

_SMOOTHING: Final = 0.2
"""Weight of the newest request in the running mean of how long one holds its slot."""


class Waiting(Protocol):
    """What the queue has to know of a request."""

    @property
    def client(self) -> str:
        """Who asked; requests of one client queue behind each other."""
        ...

    @property
    def model(self) -> str:
        """The id of the model it needs."""
        ...


T = TypeVar("T", bound=Waiting)


class QueueFullError(Exception):
    """The queue holds as many requests as it may.

    `position` is the place the request would have had (from 1), `wait_s` an estimate of its wait in seconds.
    """

    def __init__(self, position: int, wait_s: float) -> None:
        waiting = position - 1
        before = "1 request is" if waiting == 1 else f"{waiting} requests are"
        super().__init__(f"{before} waiting already; a place may be free in about {math.ceil(wait_s)} s")
        self.position = position
        self.wait_s = wait_s


class Scheduler(Generic[T]):
    """Requests waiting for a slot; clients take turns, so one with a hundred requests delays no other by a hundred."""

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._lines: OrderedDict[str, deque[T]] = OrderedDict()
        self._mean_s = 1.0

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[T]:
        for line in self._lines.values():
            yield from line

    def submit(self, request: T, slots: int) -> None:
        """Let `request` wait; QueueFullError where there is no place. `slots` is for the estimate in that error."""
        waiting = len(self)
        if waiting >= self._max_queue:
            raise QueueFullError(waiting + 1, self.estimate_s(waiting, slots))
        self._lines.setdefault(request.client, deque()).append(request)

    def put_back(self, request: T) -> None:
        """Let a request that `next` took out wait again, where it was: it is the next to be tried."""
        self._lines.setdefault(request.client, deque()).appendleft(request)
        self._lines.move_to_end(request.client, last=False)

    def next(self, admissible: Callable[[str], bool]) -> T | None:
        """Take out the request that is to start now, or None.

        `admissible` says of a model whether it could start one. The client whose turn it is goes to the back of the
        turns; a request whose model cannot start now holds up no request for another model.
        """
        refused: set[str] = set()
        for client, line in self._lines.items():
            for request in line:
                if request.model in refused:
                    continue
                if not admissible(request.model):
                    refused.add(request.model)
                    continue
                self._take(client, request)
                if client in self._lines:
                    self._lines.move_to_end(client)
                return request
        return None

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out every request that `unwanted` says yes to, in no particular order of clients."""
        removed = [request for request in self if unwanted(request)]
        for request in removed:
            self._take(request.client, request)
        return removed

    def finished(self, held_s: float) -> None:
        """A request left its slot after `held_s` seconds: what the next estimate is made of."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)

    def estimate_s(self, ahead: int, slots: int) -> float:
        """Roughly how many seconds a request with `ahead` others before it waits."""
        return max(1.0, self._mean_s * (ahead + 1) / max(1, slots))

    def _take(self, client: str, request: T) -> None:
        line = self._lines[client]
        line.remove(request)
        if not line:
            del self._lines[client]
