"""The web workers: granian's processes, started again when they die or hang, and given up if none can ever start.

`WebServer` replaces granian's answer to their deaths and nothing else: granian ends the whole service
when one web worker dies twice within 5.5 s, even if the others serve.
That answer is private in granian; test_granian_contract.py names what this module uses of it.
"""

import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, Final

import structlog
from granian.constants import Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.common import SocketSpec
from granian.server.mp import MPServer, WorkerProcess

from server.processes.descriptors import places_for_connections
from server.processes.forked_web_worker import (
    EXIT_FAILED,
    Create,
    block_sigterm,
    load,
    reaper_of,
    set_signals,
    unblock_sigterm,
)
from server.processes.replacement import ForkedWorker, Inherited, Listeners, Replacements, RetiredWorkers
from server.processes.restarts import RestartPauses, death_cause
from server.processes.systemd import Systemd
from server.processes.terminal import terminal_is_gone
from server.processes.watchdog import BEAT_INTERVAL_S, Watchdog
from server.reload import TLS, MainLink, ReloadOutcome, Reloads, WebState
from shared.log import set_log_level
from shared.settings import Settings
from shared.stacks import write_stacks_on_signals

FAILED_STARTS: Final = 3
"""The service ends if no web worker serves and one has failed to start so many times in a row."""

_BACKLOG: Final = 4096
"""Connections that the kernel holds until granian accepts them; it takes no more than net.core.somaxconn."""

HTTP1: Final = HTTP1Settings(header_read_timeout=30_000, max_buffer_size=131_072)
"""A request's headers must be complete within 30 s, also those of the next request of an open connection.

A client that drips headers holds so much memory at most; granian's default is 418 kB a connection.
"""

HTTP2: Final = HTTP2Settings(max_concurrent_streams=100, max_headers_size=65_536)
"""Granian would take 16 MB of headers a request."""

_GRANIAN_LOGS: Final[dict[str, Any]] = {
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"handlers": [], "propagate": True}, "granian.access": {"handlers": [], "propagate": True}},
}
"""Granian's loggers have no handlers of their own, so their lines go where all others go."""

_REPLACEMENT_POLL_S: Final = 0.1
_NOTED_WITHIN_S: Final = 5.0
_TLS_MIN: Final = SSLProtocols.tls12

log = structlog.get_logger(__name__)


def join(process: BaseProcess, timeout: float | None = None) -> None:
    """Process.join, behind which `is_alive` is right.

    A thread of granian's joins each process too. The one of the two that the kernel does not tell returns before the
    other has noted the end. Granian, at its stop, then killed one of a hundred web workers that had just ended.
    """
    process.join(timeout)
    noted_by = time.monotonic() + _NOTED_WITHIN_S
    while process.is_alive() and wait([process.sentinel], 0) and time.monotonic() < noted_by:
        time.sleep(0.001)


@dataclass
class _WorkerState:
    """The history of the web worker at one index."""

    current: ForkedWorker
    """The current process, or the one that died last."""
    pauses: RestartPauses = field(default_factory=RestartPauses)
    failed_starts: int = 0
    start_at: float | None = None
    """The time at which the next process starts; None while one runs."""


class WebServer(MPServer):
    """Granian with the web workers that `settings` ask for; each runs the application that `create` returns.

    `create` gets what asks for a reload, and `reload` makes one (see Reloads).
    Granian serves one address a process, so each of `addresses` has web workers of its own.
    Web workers are forked, so they inherit the state of the main process.
    """

    def __init__(
        self,
        settings: Settings,
        addresses: Sequence[str],
        create: Create,
        reload: Callable[[], tuple[ReloadOutcome, WebState | None]],
    ) -> None:
        workers = settings.web_workers * len(addresses)
        places = places_for_connections(math.ceil(settings.max_connections / workers))
        super().__init__(
            "server.app:web_application",
            address=addresses[0],
            port=settings.port,
            interface=Interfaces.ASGI,
            workers=workers,
            backlog=_BACKLOG,
            backpressure=places,
            http1_settings=HTTP1,
            http2_settings=HTTP2,
            ssl_cert=settings.tls_cert,
            ssl_key=settings.tls_key,
            ssl_protocol_min=_TLS_MIN,
            workers_kill_timeout=math.ceil(settings.drain_timeout_s),
            log_level=LogLevels(settings.log_level),
            log_dictconfig=_GRANIAN_LOGS,
        )
        self._addresses = addresses
        self._create = create
        self._timeout_s = settings.worker_timeout_s
        self._reaper = partial(reaper_of, settings.port, places)
        self._states: dict[int, _WorkerState] = {}
        self._systemd = Systemd()
        self._reload = reload
        self._replacements = Replacements()
        self._retired = RetiredWorkers(self.workers_kill_timeout)
        self.is_hurried = False
        """True after a second Ctrl-C: whatever still runs is to be killed."""
        self._listeners = Listeners()
        self._numbers = itertools.count()
        self._reloads = Reloads(self._read_anew, self.main_loop_interrupt.set, lambda: self._replacements.finished)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup does that; granian sets its handler regardless
            self.on_startup(partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
        # The default of Python 3.14 is another one, for which granian would start fresh interpreters.
        multiprocessing.set_start_method("fork", force=True)

    def run(self) -> int:
        """Serve until a signal ends the service; returns the exit code."""
        # A web worker must never run with this process's signal handlers, which would swallow its SIGTERM.
        write_stacks_on_signals()
        os.register_at_fork(before=block_sigterm, after_in_parent=unblock_sigterm, after_in_child=set_signals)
        try:
            self._reloads.start()
            self.serve(target_loader=partial(load, self._create, self._reaper, os.getpid()), wrap_loader=False)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else EXIT_FAILED
        finally:
            self._reloads.close()
        return 0

    def signal_handler_interrupt(self, *arguments: Any, **options: Any) -> None:
        """The first signal lets running streams end. Ctrl-C after it does not wait for them.

        A second SIGTERM says nothing new: systemd and scripts may send several.
        """
        if self.interrupt_signal and arguments[:1] == (signal.SIGINT,):
            self.is_hurried = True
            for worker in self.wrks:
                worker.kill()
        super().signal_handler_interrupt(*arguments, **options)

    def signal_handler_reload(self, *_arguments: Any, **_options: Any) -> None:
        """SIGHUP, for which granian would start its web workers anew: a reload, or the end if the terminal is gone."""
        if terminal_is_gone():
            self.signal_handler_interrupt()
        else:
            self._reloads.request()

    def _read_anew(self) -> tuple[ReloadOutcome, WebState | None]:
        outcome, state = self._reload()
        if state is not None:
            set_log_level(state.settings.log_level)
            self.log_level = LogLevels(state.settings.log_level)  # of web workers to come
            if TLS & set(outcome.changed):
                # Granian resolves symbolic links here, and a renewal may have changed these.
                cert, key = state.settings.tls_cert, state.settings.tls_key
                self.build_ssl_context(cert, key, None, _TLS_MIN, None, [], client_verify=False)
                self._replacements.begin(self.workers)
        return outcome, state

    def _spawn_worker(self, idx: int, target: Any, callback_loader: Callable[..., Any]) -> WorkerProcess:
        worker = self._fork(idx, target, callback_loader)
        state = self._states.setdefault(idx, _WorkerState(worker))
        state.current, state.start_at = worker, None
        return worker.process

    def _fork(
        self, idx: int, target: Any, callback_loader: Callable[..., Any], *, is_successor: bool = False
    ) -> ForkedWorker:
        """A process for the web worker at `idx`, about to be started."""
        number = next(self._numbers)
        watchdog = Watchdog(idx + 1, self._timeout_s, time.monotonic())
        address = self._addresses[idx % len(self._addresses)]
        if self.ssl_ctx[0]:
            self._ssp, self._shd = None, self._listeners.holder(idx, address, self.bind_port, self.backlog)
        else:  # without a successor to share it with, the socket is the web worker's own, and goes when that dies
            self._ssp = SocketSpec(address, self.bind_port, self.backlog)
        link = MainLink(number, self._reloads.link(number), self._reloads.outbox)
        loader = partial(
            callback_loader, Inherited(watchdog.beat, link, *self._listeners.descriptors(idx), is_successor)
        )
        process = super()._spawn_worker(idx, target, loader)
        process.join = partial(join, process.inner)
        return ForkedWorker(number, process, watchdog)

    def _serve_loop(self, spawn_target: Any, target_loader: Any) -> None:
        """Run until a signal ends the service; SystemExit, after all web workers were stopped, if none can start."""
        while not self.interrupt_signal:
            self.main_loop_interrupt.wait(self._seconds_to_next_turn())
            self.main_loop_interrupt.clear()
            if self.interrupt_signal:
                log.info("stopping", streams_may_take_s=self.workers_kill_timeout, hint="Ctrl-C again does not wait")
                self._systemd.stopping()
                return
            if any(state.current.watchdog.has_served for state in self._states.values()):
                self._systemd.ready()
            while self.interrupt_children:
                self._on_death(self.interrupt_children.pop(0))
            self._replace(spawn_target, target_loader)
            self._reloads.turn()
            for idx, state in self._states.items():
                if state.start_at is None:
                    state.current.watchdog.check(self.wrks[idx].inner, time.monotonic())
                elif state.start_at <= time.monotonic():
                    self.wrks[idx] = self._spawn_worker(idx, spawn_target, target_loader)
                    self.wrks[idx].start()

    def _replace(self, spawn_target: Any, target_loader: Any) -> None:
        """Let a new process take the place of the next web worker that is to be replaced."""
        for number in self._retired.check(time.monotonic()):
            self._reloads.unlink(number)
        failed = self._replacements.successor
        successor = self._replacements.check(time.monotonic())
        if successor is not None:
            old = self._take_place(successor)
            self._retired.add(successor.process.idx, old, time.monotonic())
            self._reloads.retire(old.number)
        elif failed is not None and self._replacements.successor is None:
            self._reloads.unlink(failed.number)
        idx = self._replacements.next()
        if idx is not None and self._states[idx].start_at is None:  # a dead one starts with the new files anyway
            self._replacements.successor = successor = self._fork(idx, spawn_target, target_loader, is_successor=True)
            successor.process.interrupt_by_parent = True  # `Replacements.check` looks at it
            successor.process.start()

    def _take_place(self, successor: ForkedWorker) -> ForkedWorker:
        """Make `successor` the web worker at its index; returns the one before it."""
        idx = successor.process.idx
        state = self._states[idx]
        old, state.current, state.start_at = state.current, successor, None
        old.process.interrupt_by_parent = True  # its end is no death
        if idx in self.interrupt_children:
            self.interrupt_children.remove(idx)
        self.wrks[idx] = successor.process
        successor.process.interrupt_by_parent = False
        if not successor.process.is_alive():
            self.interrupt_children.append(idx)  # it died before the line above
        return old

    def _drop_shared_socket(self) -> None:
        """The service stops: the port closes as soon as all web workers have closed it. All processes stop at once."""
        self._listeners.close_all()
        successor = self._replacements.successor
        self.wrks += [*self._retired.processes, *([successor.process] if successor else [])]
        super()._drop_shared_socket()

    def _seconds_to_next_turn(self) -> float:
        starts = [state.start_at - time.monotonic() for state in self._states.values() if state.start_at is not None]
        return max(0.0, min([BEAT_INTERVAL_S if self._replacements.finished else _REPLACEMENT_POLL_S, *starts]))

    def _on_death(self, idx: int) -> None:
        state, worker = self._states[idx], self.wrks[idx]
        self._reloads.unlink(state.current.number)
        code, watchdog = worker.inner.exitcode, state.current.watchdog
        if watchdog.has_served:
            state.failed_starts = 0
        elif code != -signal.SIGKILL:  # that comes from outside: a user, or the kernel when memory is short
            state.failed_starts += 1
        others = (
            other for at, other in enumerate(self.wrks) if at != idx and self._states[at].current.watchdog.has_served
        )
        if state.failed_starts >= FAILED_STARTS and not any(other.is_alive() for other in others):
            log.critical("web_workers_cannot_start", cause=death_cause(code), attempts=state.failed_starts)
            self.shutdown(EXIT_FAILED)
        pause_s = state.pauses.after_death(time.monotonic() - worker.birth)
        successor = self._replacements.take_successor(idx)
        if successor is None:
            self._listeners.close(idx)
            state.start_at = time.monotonic() + pause_s
        else:
            self._take_place(successor)
            pause_s = 0.0
        hung_s = watchdog.hung_s
        cause = death_cause(code) if hung_s is None else f"no answer for {hung_s:.0f} s"
        log.error("web_worker_died", worker=idx + 1, cause=cause, restart_in_s=pause_s)
