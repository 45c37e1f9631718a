"""One web worker, from its fork to its end: its application, its beat, and the signals that it takes."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from server.engine import EngineClient
from server.http.forwarded import is_trusted_proxy
from server.http.middleware import HttpMiddleware
from server.processes.connection_reaper import ConnectionReaper
from server.processes.heap_trimmer import HeapTrimmer
from server.processes.replacement import Inherited
from server.processes.retirement import Retirement
from server.processes.watchdog import BEAT_INTERVAL_S
from server.reload import AskReload, take_state

EXIT_FAILED: Final = 1

_SERVING_AFTER_S: Final = 0.3
"""After the application's start, granian surely listens for signals."""

_STOP_MARGIN_S: Final = 2.0
"""The part of the drain timeout that is left when WebSockets must close; the main process then kills web workers."""

_PARENT_POLL_S: Final = 0.5
_ORPHAN_GRACE_S: Final = 5.0
"""The time of an orphaned web worker to end its streams; the GPU worker is gone as well."""

_GPU_WORKER_WAIT_S: Final = 10.0
_GPU_WORKER_POLL_S: Final = 0.02

Create = Callable[[AskReload], HttpMiddleware]


def reaper_of(port: int, places: int, application: HttpMiddleware) -> ConnectionReaper:
    """The reaper of the connections at `port`, of which there may be `places`."""
    state = application.app.state
    return ConnectionReaper(
        application.open_requests,
        port=port,
        limit=places,
        address_limit=lambda: state.settings.max_connections_per_address,
        is_exempt=lambda address: is_trusted_proxy(state.settings, address),
        read_timeout_s=lambda: state.settings.stall_timeout_s,
        is_stopping=lambda: application.refuses_requests,
    )


def load(
    create: Create,
    reaper: Callable[[HttpMiddleware], ConnectionReaper],
    main_pid: int,
    inherited: Inherited,
) -> HttpMiddleware:
    """The application of this web worker. It keeps the beat fresh once it serves, and ends with the main process."""
    for listener in inherited.foreign_listeners:
        os.close(listener)
    threading.Thread(target=_end_with_parent, args=(main_pid,), name="parent", daemon=True).start()
    application = create(inherited.link.reload)
    connections = reaper(application)
    retire = Retirement(application, connections, inherited.listener).begin
    if inherited.is_successor:
        application.app.on_startup.append(partial(_wait_for_gpu_worker, application))
    application.app.on_startup.append(partial(_on_startup, inherited, application, retire))
    application.app.on_startup.append(connections.start)
    application.app.on_startup.append(HeapTrimmer(application.open_requests).start)
    return application


async def _wait_for_gpu_worker(application: HttpMiddleware) -> None:
    """Accept nothing before the GPU worker can be asked, as it can by the web worker that serves until then."""
    engine: EngineClient = application.app.state.engine
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GPU_WORKER_WAIT_S):
            while engine.unavailable() is not None:  # noqa: ASYNC110 -- the engine client tells of no change
                await asyncio.sleep(_GPU_WORKER_POLL_S)


async def _on_startup(inherited: Inherited, application: HttpMiddleware, retire: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    inherited.link.start(partial(take_state, application), retire)

    def keep_fresh() -> None:
        inherited.beat.value = time.monotonic()
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
    """Refuse requests, and let WebSockets end, which granian would close at once; then granian may stop.

    `stopping` ends responses that have no end of their own: granian waits for them.
    """
    state = application.app.state
    state.stopping.set()
    application.refuses_requests = True
    try:
        await application.open_sockets.drain(max(0.0, state.settings.drain_timeout_s - _STOP_MARGIN_S))
    finally:
        signal.raise_signal(signal.SIGTERM)
        unblock_sigterm()
        block_sigterm()


def _end_with_parent(parent: int) -> None:
    """Stop this web worker if the main process was killed, because no other process would stop or replace it."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(EXIT_FAILED)


def block_sigterm() -> None:
    """Keep SIGTERM waiting: a web worker starts so, and takes the first one once granian in it listens for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def unblock_sigterm() -> None:
    """Take SIGTERM, and one that has been waiting."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def set_signals() -> None:
    """Ctrl-C, SIGHUP and a closed terminal are for the main process, which tells its web workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
