"""`serve`: granian with the web application, and the GPU worker beside it unless TTS_WORKER_URL names one.

It owns the order of start and stop: settings, port, worker, web workers; then web workers (drained), worker.
Exit codes: 0 stopped, 1 no web worker could start or the port is taken, 2 wrong settings, 3 the worker's address is.
"""

import argparse
import asyncio
import ctypes
import errno
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

import structlog
from granian.constants import Interfaces
from granian.log import LogLevels

from server.app import from_environment
from server.http.middleware import HttpMiddleware
from server.processes import Supervisor, WebServer
from shared.catalog import CatalogError
from shared.environment import NO_CUDA, environment, unknown_models, wrong_places
from shared.log import set_up_logging
from shared.settings import PREFIX, Settings, SettingsError, load_settings, variable_of
from shared.sockets import AddressError, ipc_path

EXIT_FAILED: Final = 1
EXIT_WRONG_SETTINGS: Final = 2

_SERVING_AFTER_S: Final = 0.3
"""From the start of the application until granian surely listens for signals."""

_PARENT_POLL_S: Final = 0.5
_ORPHAN_GRACE_S: Final = 5.0
"""What an orphaned web worker has to end its streams in; the GPU worker is gone as well."""

_STOP_MARGIN_S: Final = 5.0
"""What the GPU worker gets beyond the drain timeout to put its models away."""

_GRANIAN_LOGS: Final[dict[str, Any]] = {
    "formatters": {},
    "handlers": {},
    "loggers": {"_granian": {"handlers": [], "propagate": True}, "granian.access": {"handlers": [], "propagate": True}},
}
"""Granian's lines go where all the others go."""

log = structlog.get_logger(__name__)


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """None: a service is set up by TTS_* variables."""


def run(_arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit code."""
    environ = environment()
    try:
        settings = load_settings(environ, unknown_models, _problems_of_worker)
    except (SettingsError, CatalogError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS
    set_up_logging(settings.log_level, settings.log_format, "main")
    if problem := _port_problem(settings):
        sys.stderr.write(f"{problem}\n")
        return EXIT_FAILED
    # What granian's web workers, which fork from here, and the GPU worker read.
    os.environ.update({name: value for name, value in environ.items() if name.startswith(PREFIX)})
    signal.signal(signal.SIGTERM, _leave)  # until granian takes over
    if settings.worker_url is not None:
        return _serve(settings, _granian(settings))
    try:
        with _private_address() as url:
            os.environ[variable_of("worker_url")] = url
            return _serve_with_worker(settings)
    except AddressError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_WRONG_SETTINGS


def load_application(main_pid: int, served: ctypes.c_bool) -> HttpMiddleware:
    """The web application of one web worker, which ends when granian's main process is gone.

    `served` is set once it serves.
    """
    threading.Thread(target=_leave_with_parent, args=(main_pid,), name="parent", daemon=True).start()
    application = from_environment()
    application.app.on_startup.append(partial(_serving_soon, served))
    return application


def _serve_with_worker(settings: Settings) -> int:
    server = _granian(settings)
    supervisor = Supervisor(
        [sys.executable, "-m", "gpu_worker", "--parent", str(os.getpid())],
        os.environ,
        stop_timeout_s=settings.drain_timeout_s + _STOP_MARGIN_S,
        on_final=lambda _code: server.signal_handler_interrupt(),
    )
    supervisor.start()
    try:
        code = _serve(settings, server)
    finally:
        supervisor.stop()
    return supervisor.exit_code or code


def _serve(settings: Settings, server: WebServer) -> int:
    server.on_startup(lambda: _announce(settings))
    # Not one instant may a web worker run with the handlers of this process, which would swallow its SIGTERM.
    os.register_at_fork(before=_hold_the_end_back, after_in_parent=_let_the_end_come, after_in_child=_ignore_interrupts)
    try:
        server.serve(target_loader=partial(load_application, os.getpid()), wrap_loader=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_FAILED
    return 0


def _granian(settings: Settings) -> WebServer:
    """Granian's options; a web worker that does not stop is killed."""
    return WebServer(
        "server.app:from_environment",
        address=settings.host,
        port=settings.port,
        interface=Interfaces.ASGI,
        workers=settings.web_workers,
        workers_kill_timeout=math.ceil(settings.drain_timeout_s),
        log_level=LogLevels(settings.log_level),
        log_dictconfig=_GRANIAN_LOGS,
    )


def _problems_of_worker(settings: Settings) -> list[str]:
    """What would stop a GPU worker on this machine, where it is ours to start."""
    if settings.worker_url is not None:
        return []
    problems = wrong_places(settings)
    if settings.default_device == "cuda":
        # A process of its own is asked: this one, and its web workers, stay without the worker's code.
        asked = subprocess.run([sys.executable, "-m", "gpu_worker", "cuda"], stdin=subprocess.DEVNULL, check=False)
        if asked.returncode:
            problems.append(f"{variable_of('default_device')}: {NO_CUDA}")
    return problems


def _announce(settings: Settings) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    log.info("serving", url=url, docs=f"{url}/docs", web_workers=settings.web_workers)


def _port_problem(settings: Settings) -> str | None:
    """Why the address cannot be listened on, if so.

    Granian's web workers share the port (SO_REUSEPORT) and would do so with a stranger's; this bind does not.
    """
    where = f"{settings.host} port {settings.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{where} is in use by another program; stop it, or choose another with {variable_of('port')}"
        return f"{where} cannot be listened on: {error.strerror or error}"
    return None


@contextmanager
def _private_address() -> Iterator[str]:
    """An address for the GPU worker that only this user can reach; its folder (0700) goes with the service."""
    folder = Path(tempfile.mkdtemp(prefix="tts-"))
    try:
        url = f"ipc://{folder}/worker.ipc"
        ipc_path(url)
        yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leave(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _hold_the_end_back() -> None:
    """Let SIGTERM wait: a web worker is born like that, and takes it only once granian in it listens for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _let_the_end_come() -> None:
    """Let SIGTERM through, also one that has been waiting."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _ignore_interrupts() -> None:
    """A terminal's Ctrl-C is for the main process, which stops its web workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


async def _serving_soon(served: ctypes.c_bool) -> None:
    def serving() -> None:
        served.value = True
        _let_the_end_come()

    asyncio.get_running_loop().call_later(_SERVING_AFTER_S, serving)


def _leave_with_parent(parent: int) -> None:
    """Stop this web worker when the main process was killed: nobody would stop or replace it any more."""
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_S)
    os._exit(EXIT_FAILED)
