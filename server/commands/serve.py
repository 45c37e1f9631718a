"""`serve`: the web workers, and the GPU worker beside them unless TTS_WORKER_URL names one.

It owns the order of start and stop: settings, port, GPU worker, web workers; then web workers (drained), GPU worker.
Exit codes: 0 stopped; 1 no web worker could start, or another program has the port; 2 the settings are wrong;
3 another GPU worker has the address.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import structlog

from server.app import web_application
from server.engine import OutageFile
from server.http.keys import KeysError, load_keyring
from server.processes import (
    HUGE_PAGES,
    HostError,
    PortError,
    PortTakenError,
    Supervisor,
    WebServer,
    addresses_of,
    hold_port,
    terminal_is_gone,
    tls_problems,
)
from server.reload import Configuration
from server.text import PronunciationsError, check_pronunciations
from shared.access import current_user
from shared.catalog import CatalogError
from shared.environment import NO_CUDA, impossible_kernels, unknown_models, unusable_folders
from shared.log import set_up_logging
from shared.settings import Settings, SettingsError, variable_of
from shared.sockets import AddressError, ipc_path
from shared.trace_settings import tracing_problems

EXIT_FAILED: Final = 1
EXIT_WRONG_SETTINGS: Final = 2

_STOP_MARGIN_S: Final = 5.0
"""The GPU worker may take so long beyond the drain timeout to free its models."""

log = structlog.get_logger(__name__)


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """None: TTS_* variables configure the service."""


def run(_arguments: argparse.Namespace) -> int:
    """Serve until a signal ends the service; returns the exit code."""
    try:
        configuration = Configuration(_CHECKS, _START_CHECKS)
        settings = configuration.settings
        addresses = addresses_of(settings.host)
        port = hold_port(addresses, settings.port)
    except (SettingsError, CatalogError, HostError, PortError) as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED if isinstance(error, PortTakenError) else EXIT_WRONG_SETTINGS
    set_up_logging(settings.log_level, settings.log_format, "main")
    # Until granian sets its own handlers:
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup has SIGHUP ignored
        signal.signal(signal.SIGHUP, _exit_if_closed)
    with port:
        if settings.worker_url is not None:
            if not os.access(folder := ipc_path(settings.worker_url).parent, os.X_OK):
                reason = f"{folder} cannot be entered by {current_user()} until a GPU worker of that user has made it"
                log.warning("worker_folder_missing", reason=f"{variable_of('worker_url')}: {reason}")
            return _web_server(configuration, addresses).run()
        try:
            with _private_address() as url:
                configuration.use_worker(url)
                return _serve_with_worker(configuration, addresses, url)
        except AddressError as error:
            sys.stderr.write(f"{error}\n")
            return EXIT_WRONG_SETTINGS


def _serve_with_worker(configuration: Configuration, addresses: list[str], url: str) -> int:
    settings = configuration.settings
    server = _web_server(configuration, addresses)
    supervisor = Supervisor(
        [sys.executable, "-m", "gpu_worker", "--parent", str(os.getpid())],
        lambda: HUGE_PAGES | configuration.worker_environ(),
        timeout_s=settings.worker_timeout_s,
        stop_timeout_s=settings.drain_timeout_s + _STOP_MARGIN_S,
        on_final=server.signal_handler_interrupt,
        on_outage=OutageFile(url).write,
        is_hurried=lambda: server.is_hurried,
    )
    # Not before granian has set its signal handlers: a GPU worker inherits that SIGHUP is ignored, as nohup has it.
    server.on_startup(supervisor.start)
    try:
        code = server.run()
    finally:
        supervisor.stop()
    return supervisor.exit_code or code


def _web_server(configuration: Configuration, addresses: list[str]) -> WebServer:
    settings = configuration.settings
    server = WebServer(
        settings, addresses, lambda ask_reload: web_application(configuration.state, ask_reload), configuration.reload
    )
    url = settings.url("localhost" if settings.host == "*" else settings.host)
    server.on_startup(
        lambda: log.info("serving", url=url, docs=f"{url}/docs", addresses=addresses, web_workers=settings.web_workers)
    )
    return server


def _worker_problems(settings: Settings) -> list[str]:
    """The settings that would stop the GPU worker, if it runs on this machine."""
    if settings.worker_url is not None:
        return []
    return [*unusable_folders(settings), *impossible_kernels(settings)]


def _device_problems(settings: Settings) -> list[str]:
    """The settings that need a device which is not there. A look for one takes a second, so a reload makes none."""
    needing_cuda = settings.needing_cuda()
    if settings.worker_url is not None or not needing_cuda:
        return []
    # A process of its own looks for the device, so that the web side never loads the worker's code.
    probe = subprocess.run([sys.executable, "-m", "gpu_worker", "cuda"], stdin=subprocess.DEVNULL, check=False)
    return [f"{variable}: {NO_CUDA}; auto works without one" for variable in needing_cuda] if probe.returncode else []


def _host_problems(settings: Settings) -> list[str]:
    try:
        addresses_of(settings.host)
    except HostError as error:
        return [f"{variable_of('host')}: {error}; 127.0.0.1 is for this machine alone, * for every address"]
    return []


def _pronunciations_problems(settings: Settings) -> list[str]:
    try:
        check_pronunciations(settings.pronunciations)
    except PronunciationsError as error:
        return [f"{variable_of('pronunciations')}: {error}"]
    return []


def _keys_problems(settings: Settings) -> list[str]:
    try:
        load_keyring(settings)
    except KeysError as error:
        return [f"{variable_of('keys_file')}: {error}"]
    return []


def _tracing_problems(settings: Settings) -> list[str]:
    return tracing_problems(settings, os.environ)


WEB_CHECKS: Final = (
    _host_problems,
    tls_problems,
    _keys_problems,
    _pronunciations_problems,
    _tracing_problems,
    unknown_models,
)
"""Checks of settings beyond their form, which hold wherever the GPU worker runs."""

_CHECKS: Final = (*WEB_CHECKS, _worker_problems)

_START_CHECKS: Final = (_device_problems,)


@contextmanager
def _private_address() -> Iterator[str]:
    """An address for the GPU worker that only this user can reach; its folder (0700) is removed at the end."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="tts-"))
    except OSError as error:
        raise AddressError(f"no folder for the GPU worker's socket can be made (TMPDIR): {error.strerror}") from None
    try:
        url = f"ipc://{folder}/worker.ipc"
        try:
            ipc_path(url)
        except AddressError as error:
            raise AddressError(f"{error}; name another folder with TMPDIR") from None
        yield url
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exit_if_closed(_signal: int, _frame: FrameType | None) -> None:
    """SIGHUP during the start: the settings have just been read, so only a terminal that is gone means anything."""
    if terminal_is_gone():
        sys.exit(0)


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)
