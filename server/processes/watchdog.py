"""The silence after which a process counts as hung, and the end of a hung web worker.

`Silence` decides for the GPU worker's supervisor and for the watchdogs of the web workers.
"""

import contextlib
import ctypes
import math
import os
import signal
from multiprocessing.sharedctypes import RawValue
from typing import Final, Protocol

import structlog

BEAT_INTERVAL_S: Final = 1.0
"""The event loop of a web worker sets its beat so often, and the main process looks as often."""

START_TIMEOUT_S: Final = 60.0
"""A web worker that has not begun to serve may be silent so long: it starts in under a second on an idle machine."""

STACKS_TIMEOUT_S: Final = 1.0
"""A process that hangs gets so long to write the stacks of its threads."""

PAUSED_AFTER_S: Final = 5.0
"""A look that comes so late means that this process was paused: perhaps with the other one, as `docker pause` does."""

log = structlog.get_logger(__name__)


class Silence:
    """How long another process has given no sign of life. It counts from the first sign.

    `exceeds` is called about every second; `now` is in monotonic seconds.
    """

    def __init__(self, now: float) -> None:
        self._looked_at = now
        self._heard_at: float | None = None

    def heard(self, at: float) -> None:
        """Note a sign of life; an old one changes nothing."""
        self._heard_at = at if self._heard_at is None else max(self._heard_at, at)

    def exceeds(self, timeout_s: float, now: float) -> bool:
        """True if the silence is too long. After a pause of this process, it counts from now."""
        paused, self._looked_at = now - self._looked_at > PAUSED_AFTER_S, now
        if self._heard_at is None:
            return False
        if paused:
            self._heard_at = now
        return now - self._heard_at > timeout_s


class Process(Protocol):
    """The part of multiprocessing's Process that `Watchdog` needs."""

    @property
    def pid(self) -> int | None:
        """The process id."""

    def kill(self) -> None:
        """Send SIGKILL."""


class Watchdog:
    """Kills one web worker whose event loop stands still for `timeout_s`: it hangs, or it was stopped from outside.

    The web worker writes the stacks of its threads first; SIGCONT lets a stopped one do that too.
    `worker` is its number in the log, `now` the time of its start.
    """

    def __init__(self, worker: int, timeout_s: float, now: float) -> None:
        self._worker = worker
        self._timeout_s = timeout_s
        self._silence = Silence(now)
        self._silence.heard(now)
        self._kill_at = math.inf
        self.beat: ctypes.c_double = RawValue(ctypes.c_double)
        """Shared with the web worker, which sets it to monotonic seconds every BEAT_INTERVAL_S; 0 until it serves."""
        self.hung_s: float | None = None
        """After how many silent seconds the web worker counted as hung; None if it never did."""

    @property
    def has_served(self) -> bool:
        """True if the web worker got as far as to serve."""
        return self.beat.value > 0

    def check(self, process: Process, now: float) -> None:
        """Kill the web worker's process if it hangs; called every BEAT_INTERVAL_S."""
        if self.hung_s is not None:
            if now >= self._kill_at:
                process.kill()
                self._kill_at = math.inf
            return
        timeout_s = self._timeout_s if self.has_served else max(self._timeout_s, START_TIMEOUT_S)
        self._silence.heard(self.beat.value)
        if self._silence.exceeds(timeout_s, now):
            self.hung_s, self._kill_at = timeout_s, now + STACKS_TIMEOUT_S
            pid = process.pid
            log.error("web_worker_hangs", worker=self._worker, pid=pid, silent_s=timeout_s, stacks="follow on stderr")
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGUSR2)
                    os.kill(pid, signal.SIGCONT)
