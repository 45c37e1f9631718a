"""A hundred dashboards, most of which read nothing: they cost the GPU worker nothing, and the web worker no memory."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.benchmarks.frontend import cpu_seconds
from tests.recogniser import SENTENCES
from tests.system.service import Service, children_of, resident_bytes, running_service

DASHBOARDS: Final = 100
MEASURED_S: Final = 30.0
MIB: Final = 2**20


def _silent_dashboard(service: Service) -> socket.socket:
    """A dashboard over a bare socket with a small buffer, which reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", service.port))
    connection.sendall(b"GET /admin/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    return connection


def _speak_until(service: Service, over: threading.Event) -> None:
    """Listen to one speech after the other, at about ten times the speed of speech."""
    while not over.is_set():
        with service.stream(" ".join(SENTENCES), response_format="pcm") as answer:
            for _ in answer.iter_raw(48_000):
                if over.wait(0.1):
                    break


def _worker_cpu_s(pid: int) -> float:
    """The CPU time of the GPU worker in MEASURED_S seconds."""
    before = cpu_seconds([pid])
    time.sleep(MEASURED_S)
    return cpu_seconds([pid]) - before


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_hundred_dashboards(tmp_path: Path) -> None:
    """Ninety-nine more cost the GPU worker less than a hundredth of a core, and a web worker less than 20 MB.

    Requests run meanwhile, so that every quarter of a second brings an event. Idle dashboards get none.
    """
    with running_service(tmp_path) as service, contextlib.ExitStack() as stack:
        worker = service.worker_pid()
        [web] = [pid for pid in children_of(service.process.pid) if pid != worker]
        stack.enter_context(_silent_dashboard(service))
        alone_s = _worker_cpu_s(worker)
        for _ in range(DASHBOARDS - 1):
            stack.enter_context(_silent_dashboard(service))
        together_s = _worker_cpu_s(worker)
        assert together_s - alone_s < 0.01 * MEASURED_S + 0.1

        over = threading.Event()
        speaker = threading.Thread(target=_speak_until, args=(service, over))
        speaker.start()
        try:
            time.sleep(5.0)
            before = resident_bytes(web)
            time.sleep(MEASURED_S)
            assert resident_bytes(web) - before < 20 * MIB
            assert httpx.get(service.url + "/health", timeout=20, trust_env=False).status_code == httpx.codes.OK
        finally:
            over.set()
            speaker.join()
