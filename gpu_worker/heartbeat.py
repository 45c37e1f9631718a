"""Signs of life of the synthesis loop, so that a process that hangs is replaced and says where it hung.

Under a supervisor, the supervisor gets a byte a second through a pipe, and kills a silent process.
Without one, the process watches itself: a thread of C, which needs no interpreter lock, ends it.
Either way, the stacks of all threads are written to stderr first.
"""

import contextlib
import faulthandler
import os
import time
from collections.abc import Callable
from typing import Final

from shared.protocol import READY, STARTING

_INTERVAL_S: Final = 1.0


class Heartbeat:
    """`beat` is called in every turn of the loop. `pipe`: the supervisor's, or None to watch without a supervisor."""

    def __init__(self, pipe: int | None, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pipe = pipe
        self._timeout_s = timeout_s
        self._clock = clock
        self._beat_at = -_INTERVAL_S
        self._ready = False
        if pipe is not None:
            os.set_blocking(pipe, False)

    def beat(self, *, ready: bool) -> None:
        """Say that the loop turns. `ready`: the models that the start loads are loaded."""
        now = self._clock()
        if now - self._beat_at < _INTERVAL_S and ready == self._ready:
            return
        self._beat_at, self._ready = now, ready
        if self._pipe is None:
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the supervisor is busy, or gone: see --parent
            os.write(self._pipe, READY if ready else STARTING)

    def stop(self) -> None:
        """The loop has ended, and no silence counts any more."""
        faulthandler.cancel_dump_traceback_later()
