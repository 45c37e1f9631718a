"""Contract with granian: what server/processes/web_workers.py overrides and reads, some of it private.

A failure here after an upgrade of granian means that web_workers.py has to be read against the new version.
"""

import inspect
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
from granian.server.common import AbstractServer
from granian.server.mp import MPServer, WorkerProcess

from server.processes import WebServer
from server.processes.web_workers import join
from shared.settings import Settings

SIGNATURES: list[tuple[Callable[..., Any], list[str]]] = [
    (MPServer._spawn_worker, ["self", "idx", "target", "callback_loader"]),
    (MPServer._serve_loop, ["self", "spawn_target", "target_loader"]),
    (MPServer.shutdown, ["self", "exit_code"]),
    (MPServer.on_startup, ["self", "hook"]),
    (MPServer.serve, ["self", "spawn_target", "target_loader", "wrap_loader"]),
    (WorkerProcess.__init__, ["self", "parent", "idx", "target", "args"]),
]


@pytest.mark.parametrize(("method", "parameters"), SIGNATURES, ids=[method.__qualname__ for method, _ in SIGNATURES])
def test_methods(method: Callable[..., Any], parameters: list[str]) -> None:
    """The methods that WebServer overrides or calls take the parameters that it expects."""
    assert list(inspect.signature(method).parameters) == parameters


def test_attributes_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The serve loop's event, signals and children are there, with the types that WebServer uses."""
    monkeypatch.setattr(multiprocessing, "set_start_method", lambda *_arguments, **_options: None)
    server = WebServer(
        Settings(),
        ["127.0.0.1"],
        lambda _: pytest.fail("the application is created in a web worker"),
        lambda: pytest.fail("nobody has asked for a reload"),
    )
    assert isinstance(server.main_loop_interrupt, threading.Event)
    assert server.interrupt_signal is False
    assert "signal_handler_reload" in vars(AbstractServer)  # granian's handler of SIGHUP
    assert server.interrupt_children == []
    assert server.wrks == []
    assert server._ssp is None  # the socket of the next web worker
    server.signal_handler_interrupt()
    assert server.interrupt_signal is True
    assert server.main_loop_interrupt.is_set()


def test_attributes_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has its time of birth and its process, and adds its index to the server's children when it ends."""
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "fork")

    class Parent:
        main_loop_interrupt = threading.Event()
        interrupt_children: list[int] = []  # noqa: RUF012 - one instance
        reload_on_changes = False

    worker = WorkerProcess(Parent(), 3, int, ())
    worker.start()
    assert isinstance(worker.birth, float)
    assert Parent.main_loop_interrupt.wait(60)
    assert Parent.interrupt_children == [3]
    assert worker.inner.exitcode == 0
    assert not worker.is_alive()


def test_the_end_of_a_worker_that_another_thread_has_seen() -> None:
    """`join` waits until that thread has noted it, so granian does not take the worker for one that hangs."""
    process = multiprocessing.get_context("fork").Process(target=int)
    process.start()
    multiprocessing.connection.wait([process.sentinel], 60)
    os.waitpid(process.pid or 0, 0)  # as the thread does that the kernel tells
    process.join(60)
    assert process.is_alive(), "join waits for the other thread now; see server.processes.web_workers.join"
    noting = threading.Timer(0.05, lambda: setattr(process._popen, "returncode", 0))  # type: ignore[attr-defined]
    noting.start()
    join(process, 60)
    assert not process.is_alive()
    assert "wrk.join(timeout)" in inspect.getsource(AbstractServer._stop_workers)
