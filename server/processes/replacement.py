"""The replacement of web workers by new processes, one after the other: granian reads the files of https at its start.

The new process has the listening socket of the old one, so no connection that waits in its backlog is reset.
It serves before the old one takes no more connections. The old one ends with its last connection.
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Final

import structlog
from granian._granian import SocketHolder
from granian.server.common import SocketSpec
from granian.server.mp import WorkerProcess

from server.processes.watchdog import Watchdog
from server.reload import MainLink

RETIRED_S: Final = 3600.0
"""A replaced web worker may go on with its connections for so long. Then it stops as the service does."""

FAILED_REPLACEMENTS: Final = 3
"""The old web workers stay if a new one has failed to start so many times in a row."""

log = structlog.get_logger(__name__)


class Listeners:
    """The listening sockets of the web workers, by index. The main process holds them, so that two processes share one.

    The sockets of different indices share the port (SO_REUSEPORT).
    """

    def __init__(self) -> None:
        self._descriptors: dict[int, int] = {}

    def holder(self, idx: int, address: str, port: int, backlog: int) -> SocketHolder:
        """The socket of a web worker that is about to be forked."""
        if idx not in self._descriptors:
            self._descriptors[idx] = SocketSpec(address, port, backlog).build().get_fd()
        return SocketHolder(self._descriptors[idx], False, backlog)  # type: ignore[call-arg]  # its stub lacks them

    def descriptors(self, idx: int) -> tuple[int | None, list[int]]:
        """The descriptor of a web worker, and those of the others, which it must not keep open."""
        others = [descriptor for other, descriptor in self._descriptors.items() if other != idx]
        return self._descriptors.get(idx), others

    def close(self, idx: int) -> None:
        """The web worker is dead: its socket takes no more of the port's connections."""
        if idx in self._descriptors:
            os.close(self._descriptors.pop(idx))

    def close_all(self) -> None:
        """The service stops: its port is closed when the web workers have closed it."""
        for idx in list(self._descriptors):
            self.close(idx)


@dataclass(frozen=True)
class Inherited:
    """The things that a web worker has from the main process: its watchdog's beat, its link, and listening sockets."""

    beat: ctypes.c_double
    link: MainLink
    listener: int | None
    """Its own, if the main process holds that."""
    foreign_listeners: list[int]
    """Those of others, which would stay open in this process."""
    is_successor: bool
    """True if it takes the place of another one, which serves until then."""


@dataclass(frozen=True)
class ForkedWorker:
    """A process of a web worker. `number` is that of its link to the main process, unlike any other."""

    number: int
    process: WorkerProcess
    watchdog: Watchdog


@dataclass
class _Retired:
    worker: ForkedWorker
    stop_at: float
    kill_at: float
    stopped: bool = False


class RetiredWorkers:
    """The processes that others have replaced, until they end. One that must stop has `stop_timeout_s` for it."""

    def __init__(self, stop_timeout_s: float) -> None:
        self._stop_timeout_s = stop_timeout_s
        self._retired: dict[int, _Retired] = {}

    @property
    def processes(self) -> list[WorkerProcess]:
        """Those that have not ended."""
        return [one.worker.process for one in self._retired.values()]

    def add(self, idx: int, worker: ForkedWorker, now: float) -> None:
        """This web worker was replaced; one of the same index that was replaced before stops now."""
        for one in self._retired.values():
            if one.worker.process.idx == idx:
                one.stop_at = min(one.stop_at, now)
        self._retired[worker.number] = _Retired(worker, now + RETIRED_S, now + RETIRED_S + self._stop_timeout_s)

    def check(self, now: float) -> list[int]:
        """Stop those whose time is over, and kill those that hang; returns the numbers of those that have ended."""
        ended = [number for number, one in self._retired.items() if not one.worker.process.is_alive()]
        for number in ended:
            one = self._retired.pop(number)
            process = one.worker.process
            write = log.error if process.inner.exitcode else log.info
            write("web_worker_retired", worker=process.idx + 1, pid=process.inner.pid, exit_code=process.inner.exitcode)
        for one in self._retired.values():
            one.worker.watchdog.check(one.worker.process.inner, now)
            if not one.stopped and now >= one.stop_at:
                one.stopped, one.kill_at = True, now + self._stop_timeout_s
                one.worker.process.terminate()
            elif one.stopped and now >= one.kill_at:
                one.worker.process.kill()
        return ended


class Replacements:
    """The web workers that are to be replaced, and the process that is to take the place of the next one."""

    def __init__(self) -> None:
        self._waiting: list[int] = []
        self._failed = 0
        self.successor: ForkedWorker | None = None
        """It has not served yet."""

    @property
    def finished(self) -> bool:
        """True if all have been replaced."""
        return not self._waiting and self.successor is None

    def begin(self, workers: int) -> None:
        """Replace all, also one whose successor is starting at the moment: that may have read older files."""
        self._waiting = list(range(workers))
        self._failed = 0

    def next(self) -> int | None:
        """The index of the web worker that a new process is to be started for, if any."""
        return self._waiting.pop(0) if self._waiting and self.successor is None else None

    def take_successor(self, idx: int) -> ForkedWorker | None:
        """The process that starts beside the web worker, which has died."""
        successor = self.successor
        if successor is None or successor.process.idx != idx:
            return None
        self.successor = None
        return successor

    def check(self, now: float) -> ForkedWorker | None:
        """The successor, once it serves. One that has died is replaced itself, some times."""
        successor = self.successor
        if successor is None:
            return None
        if successor.process.is_alive():
            successor.watchdog.check(successor.process.inner, now)
            if not successor.watchdog.has_served:
                return None
            self.successor, self._failed = None, 0
            return successor
        self.successor = None
        self._failed += 1
        self._waiting.insert(0, successor.process.idx)
        log.error("web_worker_replacement_failed", worker=successor.process.idx + 1, attempts=self._failed)
        if self._failed >= FAILED_REPLACEMENTS:
            log.error("web_workers_not_replaced", workers=[idx + 1 for idx in self._waiting])
            self._waiting.clear()
        return None
