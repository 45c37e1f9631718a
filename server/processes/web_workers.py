"""The web workers as granian's processes: each is started again when it dies, and given up if it can never start.

It replaces granian's own answer to their deaths and nothing else of it: granian ends the whole service
when one web worker dies twice within 5.5 s, however well the others are.
"""

import ctypes
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.sharedctypes import RawValue
from typing import Any, Final

import structlog
from granian.server.mp import MPServer, WorkerProcess

from server.processes.worker_supervisor import SETTLED_S, cause_of, pause_before_restart

FAILED_STARTS: Final = 3
"""The service ends when, while no web worker serves, one has ended this often in a row before it ever served."""

_EXIT_FAILED: Final = 1

log = structlog.get_logger(__name__)


@dataclass
class _Place:
    """What became of the web workers in one place; `due` is when the next one starts, None while there is one."""

    served: ctypes.c_bool = field(default_factory=lambda: RawValue(ctypes.c_bool))
    quick_deaths: int = 0
    failed_starts: int = 0
    due: float | None = None


class WebServer(MPServer):
    """Granian, whose target loader is called with a shared flag that the web worker sets once it serves.

    Web workers are forked, so that the flag, and whatever was set up before, is theirs as well.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._places: dict[int, _Place] = {}
        # From Python 3.14 on another way is the default, and granian would start fresh interpreters.
        multiprocessing.set_start_method("fork", force=True)

    def _spawn_worker(self, idx: int, target: Any, callback_loader: Callable[..., Any]) -> WorkerProcess:
        place = self._places.setdefault(idx, _Place())
        place.served = RawValue(ctypes.c_bool)
        place.due = None
        return super()._spawn_worker(idx, target, partial(callback_loader, place.served))

    def _serve_loop(self, spawn_target: Any, target_loader: Any) -> None:
        """Until a signal ends the service. SystemExit, after the other web workers were stopped, if none can start."""
        while not self.interrupt_signal:
            self.main_loop_interrupt.wait(self._seconds_to_next_start())
            self.main_loop_interrupt.clear()
            if self.interrupt_signal:
                return
            if self.reload_signal:
                self._reload(spawn_target, target_loader)
            while self.interrupt_children:
                self._note_death(self.interrupt_children.pop(0))
            for idx, place in self._places.items():
                if place.due is not None and place.due <= time.monotonic():
                    self.wrks[idx] = self._spawn_worker(idx, spawn_target, target_loader)
                    self.wrks[idx].start()

    def _seconds_to_next_start(self) -> float | None:
        due = [place.due for place in self._places.values() if place.due is not None]
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _note_death(self, idx: int) -> None:
        place, worker = self._places[idx], self.wrks[idx]
        code = worker.inner.exitcode
        settled = time.monotonic() - worker.birth >= SETTLED_S
        place.quick_deaths = 0 if settled else place.quick_deaths + 1
        if place.served.value:
            place.failed_starts = 0
        elif code != -signal.SIGKILL:  # which comes from outside: somebody, or the kernel short of memory
            place.failed_starts += 1
        others = (other for at, other in enumerate(self.wrks) if at != idx and self._places[at].served.value)
        if place.failed_starts >= FAILED_STARTS and not any(other.is_alive() for other in others):
            log.critical("no web worker can start", cause=cause_of(code), attempts=place.failed_starts)
            self.shutdown(_EXIT_FAILED)
        pause_s = pause_before_restart(place.quick_deaths)
        place.due = time.monotonic() + pause_s
        log.error("a web worker died; it is started again", worker=idx + 1, cause=cause_of(code), pause_s=pause_s)
