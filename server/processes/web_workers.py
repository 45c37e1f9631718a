"""The web workers: granian's processes, started again when they die or hang, and given up if none can ever start.

`WebServer` replaces granian's answer to their deaths and nothing else: granian ends the whole service
when one web worker dies twice within 5.5 s, even if the others serve.
That answer is private in granian; test_granian_contract.py names what this module uses of it.
"""

import asyncio
import ctypes
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import structlog
from granian.constants import Interfaces, SSLProtocols
from granian.http import HTTP1Settings, HTTP2Settings
from granian.log import LogLevels
from granian.server.common import SocketSpec
from granian.server.mp import MPServer, WorkerProcess

from server.http.forwarded import is_trusted_proxy
from server.http.middleware import HttpMiddleware
from server.live_state import take_state
from server.processes.connection_reaper import ConnectionReaper
from server.processes.descriptors import places_for_connections
from server.processes.heap_trimmer import HeapTrimmer
from server.processes.main_link import MainLink
from server.processes.reloads import Reloads
from server.processes.restarts import RestartPauses, death_cause
from server.processes.systemd import Systemd
from server.processes.terminal import terminal_is_gone
from server.processes.watchdog import BEAT_INTERVAL_S, Watchdog
from server.reload_messages import AskReload, ReloadOutcome, WebState
from shared.log import set_log_level
from shared.settings import Settings
from shared.stacks import write_stacks_on_signals

FAILED_STARTS: Final = 3
"""The service ends if no web worker serves and one has failed to start so many times in a row."""

EXIT_FAILED: Final = 1

_SERVING_AFTER_S: Final = 0.3
"""After the application's start, granian surely listens for signals."""

_STOP_MARGIN_S: Final = 2.0
"""The part of the drain timeout that is left when WebSockets must close; the main process then kills web workers."""

_PARENT_POLL_S: Final = 0.5
_ORPHAN_GRACE_S: Final = 5.0
"""The time of an orphaned web worker to end its streams; the GPU worker is gone as well."""

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

Create = Callable[[AskReload], HttpMiddleware]

log = structlog.get_logger(__name__)


@dataclass
class _WorkerState:
    """The history of the web worker at one index."""

    watchdog: Watchdog
    """That of the current process, or of the one that died last."""
    pauses: RestartPauses = field(default_factory=RestartPauses)
    failed_starts: int = 0
    start_at: float | None = None
    """When the next process starts; None while one runs."""


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
            ssl_protocol_min=SSLProtocols.tls12,
            workers_kill_timeout=math.ceil(settings.drain_timeout_s),
            log_level=LogLevels(settings.log_level),
            log_dictconfig=_GRANIAN_LOGS,
        )
        self._addresses = addresses
        self._create = create
        self._timeout_s = settings.worker_timeout_s
        self._reaper = partial(_reaper, settings.port, places)
        self._states: dict[int, _WorkerState] = {}
        self._systemd = Systemd()
        self._reload = reload
        self._reloads = Reloads(self._read_anew, self.main_loop_interrupt.set)
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup does that; granian sets its handler regardless
            self.on_startup(partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
        # The default of Python 3.14 is another one, for which granian would start fresh interpreters.
        multiprocessing.set_start_method("fork", force=True)

    def run(self) -> int:
        """Serve until a signal ends the service; returns the exit code."""
        # A web worker must never run with this process's signal handlers, which would swallow its SIGTERM.
        write_stacks_on_signals()
        os.register_at_fork(before=_block_sigterm, after_in_parent=_unblock_sigterm, after_in_child=_set_signals)
        try:
            self._reloads.start()
            self.serve(target_loader=partial(_load, self._create, self._reaper, os.getpid()), wrap_loader=False)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else EXIT_FAILED
        finally:
            self._reloads.close()
        return 0

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
        return outcome, state

    def _spawn_worker(self, idx: int, target: Any, callback_loader: Callable[..., Any]) -> WorkerProcess:
        watchdog = Watchdog(idx + 1, self._timeout_s, time.monotonic())
        state = self._states.setdefault(idx, _WorkerState(watchdog))
        state.watchdog, state.start_at = watchdog, None
        self._ssp = SocketSpec(self._addresses[idx % len(self._addresses)], self.bind_port, self.backlog)
        link = MainLink(idx, self._reloads.link(idx), self._reloads.outbox)
        return super()._spawn_worker(idx, target, partial(callback_loader, watchdog.beat, link))

    def _serve_loop(self, spawn_target: Any, target_loader: Any) -> None:
        """Run until a signal ends the service; SystemExit, after all web workers were stopped, if none can start."""
        while not self.interrupt_signal:
            self.main_loop_interrupt.wait(self._seconds_to_next_turn())
            self.main_loop_interrupt.clear()
            if self.interrupt_signal:
                self._systemd.stopping()
                return
            if any(state.watchdog.has_served for state in self._states.values()):
                self._systemd.ready()
            while self.interrupt_children:
                self._on_death(self.interrupt_children.pop(0))
            self._reloads.turn()
            for idx, state in self._states.items():
                if state.start_at is None:
                    state.watchdog.check(self.wrks[idx].inner, time.monotonic())
                elif state.start_at <= time.monotonic():
                    self.wrks[idx] = self._spawn_worker(idx, spawn_target, target_loader)
                    self.wrks[idx].start()

    def _seconds_to_next_turn(self) -> float:
        starts = [state.start_at - time.monotonic() for state in self._states.values() if state.start_at is not None]
        return max(0.0, min([BEAT_INTERVAL_S, *starts]))

    def _on_death(self, idx: int) -> None:
        self._reloads.unlink(idx)
        state, worker = self._states[idx], self.wrks[idx]
        code = worker.inner.exitcode
        if state.watchdog.has_served:
            state.failed_starts = 0
        elif code != -signal.SIGKILL:  # that comes from outside: a user, or the kernel when memory is short
            state.failed_starts += 1
        others = (other for at, other in enumerate(self.wrks) if at != idx and self._states[at].watchdog.has_served)
        if state.failed_starts >= FAILED_STARTS and not any(other.is_alive() for other in others):
            log.critical("web_workers_cannot_start", cause=death_cause(code), attempts=state.failed_starts)
            self.shutdown(EXIT_FAILED)
        pause_s = state.pauses.after_death(time.monotonic() - worker.birth)
        state.start_at = time.monotonic() + pause_s
        hung_s = state.watchdog.hung_s
        cause = death_cause(code) if hung_s is None else f"no answer for {hung_s:.0f} s"
        log.error("web_worker_died", worker=idx + 1, cause=cause, restart_in_s=pause_s)


# --- inside a web worker ---------------------------------------------------------------------------------------------


def _reaper(port: int, places: int, application: HttpMiddleware) -> ConnectionReaper:
    state = application.app.state
    return ConnectionReaper(
        application.open_requests,
        port=port,
        limit=places,
        address_limit=lambda: state.settings.max_connections_per_address,
        is_exempt=lambda address: is_trusted_proxy(state.settings, address),
        read_timeout_s=lambda: state.settings.stall_timeout_s,
    )


def _load(
    create: Create,
    reaper: Callable[[HttpMiddleware], ConnectionReaper],
    main_pid: int,
    beat: ctypes.c_double,
    link: MainLink,
) -> HttpMiddleware:
    """The application of this web worker. It keeps `beat` fresh once it serves, and ends with the main process."""
    threading.Thread(target=_end_with_parent, args=(main_pid,), name="parent", daemon=True).start()
    application = create(link.reload)
    application.app.on_startup.append(partial(_on_startup, beat, application, link))
    application.app.on_startup.append(reaper(application).start)
    application.app.on_startup.append(HeapTrimmer(application.open_requests).start)
    return application


async def _on_startup(beat: ctypes.c_double, application: HttpMiddleware, link: MainLink) -> None:
    loop = asyncio.get_running_loop()
    link.start(partial(take_state, application))

    def keep_fresh() -> None:
        beat.value = time.monotonic()
        loop.call_later(BEAT_INTERVAL_S, keep_fresh)

    def serving() -> None:
        keep_fresh()
        threading.Thread(target=_take_one_sigterm, args=(loop, application), name="sigterm", daemon=True).start()

    loop.call_later(_SERVING_AFTER_S, serving)


def _take_one_sigterm(loop: asyncio.AbstractEventLoop, application: HttpMiddleware) -> None:
    """Let granian have the first SIGTERM, and no other: at a second one granian 2.8.7 stops for ever.

    systemd, for one, sends SIGTERM to every process of a service, and the main process sends another one.
    """
    signal.sigwait({signal.SIGTERM})
    asyncio.run_coroutine_threadsafe(_stop(application), loop)


async def _stop(application: HttpMiddleware) -> None:
    """Let WebSockets end, which granian would close at once; then granian may stop.

    `stopping` ends responses that have no end of their own: granian waits for them.
    """
    state = application.app.state
    state.stopping.set()
    try:
        await application.open_sockets.drain(max(0.0, state.settings.drain_timeout_s - _STOP_MARGIN_S))
    finally:
        signal.raise_signal(signal.SIGTERM)
        _unblock_sigterm()
        _block_sigterm()


def _end_with_parent(parent: int) -> None:
    """Stop this web worker if the main process was killed, because no other process would stop or replace it."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(EXIT_FAILED)


def _block_sigterm() -> None:
    """Keep SIGTERM waiting: a web worker starts so, and takes the first one once granian in it listens for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock_sigterm() -> None:
    """Take SIGTERM, and one that has been waiting."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _set_signals() -> None:
    """Ctrl-C, SIGHUP and a closed terminal are for the main process, which tells its web workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
