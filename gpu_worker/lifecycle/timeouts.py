"""Requests that take too long: their audio is late, their text does not come, or their reader takes nothing."""

from collections.abc import Callable
from typing import Final

from gpu_worker.engines.base import JobError
from gpu_worker.lifecycle.bounds import RequestBounds
from gpu_worker.lifecycle.open_requests import OpenRequests
from gpu_worker.lifecycle.open_text import OpenText
from gpu_worker.requests import Request
from gpu_worker.scheduling import Slots

CHECK_INTERVAL_S: Final = 0.1
"""Seconds between two looks at all open requests: there may be thousands."""


class Timeouts:
    """Fails the requests that are over a timeout."""

    def __init__(
        self,
        requests: OpenRequests,
        open_text: OpenText,
        *,
        slots: Slots,
        bounds: RequestBounds,
        clock: Callable[[], float],
    ) -> None:
        self.bounds = bounds
        self._requests = requests
        self._open_text = open_text
        self._slots = slots
        self._clock = clock
        self._checked_at = clock()

    def check_if_due(self) -> None:
        """Look at all requests, if CHECK_INTERVAL_S have passed since the last look.

        If a request could start but for the full buffer, the one that has been stalled for the longest time fails.
        """
        now = self._clock()
        if now - self._checked_at < CHECK_INTERVAL_S:
            return
        self._checked_at = now
        self._open_text.fail_overdue(now)
        for request in self._requests:
            if request.is_late(now):
                self._requests.finish(request, late(request))
        for request in self._requests:
            if request.unread_s(now) > self.bounds.stall_timeout_s:
                self._fail_slow(request, f"nothing was read for {self.bounds.stall_timeout_s:.0f} s")
        if self._slots.out_of_room:
            stalled = self._slots.longest_stalled(self._requests)
            if stalled is not None:
                reason = f"nothing was read for {stalled.unread_s(now):.0f} s, and the buffer is full"
                self._fail_slow(stalled, reason)

    def _fail_slow(self, request: Request, reason: str) -> None:
        self._requests.finish(request, JobError("client_too_slow", reason))


def late(request: Request) -> JobError:
    """The error of a request whose deadline has passed."""
    return JobError("deadline_exceeded", f"no audio could be made within {request.deadline_s:g} s")
