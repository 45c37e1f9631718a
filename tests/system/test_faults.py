"""What happens when processes die, stop or are told to end, and when clients leave: one request's trouble, no more."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.recogniser import SENTENCES
from tests.system.service import Service, children_of, eventually, is_running, resident_bytes, stretched

Start = Callable[..., Service]

LONG = " ".join(SENTENCES * 20)
"""A quarter of an hour of speech: more than credits and socket buffers swallow, so a slow reader holds its slot."""


def slow_reader(service: Service, text: str, **fields: object) -> socket.socket:
    """A client that has asked for speech on a bare socket with a small buffer, and reads nothing."""
    request = httpx.Request("POST", service.url + "/v1/audio/speech", json={"input": text, **fields})
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", service.port))
    headers = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{headers}\r\n".encode() + request.content)
    return connection


def running(service: Service) -> int:
    """Requests that hold a slot, as /admin/stats says."""
    count: int = service.stats()["running"]
    return count


def test_killed_worker_breaks_streams_and_comes_back(start: Start) -> None:
    """Kill -9 of the GPU worker: streams break, new requests get 503 at once, speech is back within 3 s."""
    service = start(WEB_WORKERS=2)
    pid = service.worker_pid()
    broken = []

    def listen() -> None:
        try:
            with httpx.stream(
                "POST", service.url + "/v1/audio/speech", json={"input": LONG, "response_format": "pcm"}, timeout=30
            ) as answer:
                for _ in answer.iter_raw(4800):
                    time.sleep(0.01)  # a listener that takes its time
        except httpx.TransportError as error:
            broken.append(error)

    listeners = [threading.Thread(target=listen) for _ in range(4)]
    for listener in listeners:
        listener.start()
    eventually(lambda: running(service) == 4, 10, "four streams")
    soon_s, limit_s = stretched(0.1), stretched(3)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: not is_running(pid), 2, "the worker's death")
    asked = time.monotonic()
    refused = service.speech("Hello.")
    if refused.status_code != httpx.codes.OK:  # it may be back already
        assert time.monotonic() - asked < soon_s
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert refused.json()["error"]["code"] == "worker_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: service.speech("Hello.").status_code == httpx.codes.OK, limit_s, "speech again")
    assert time.monotonic() - killed < limit_s
    for listener in listeners:
        listener.join(10)
    assert len(broken) == 4, "a stream ended as if it were complete"
    assert service.stats()["worker"]["restarts"] == 1


def test_stopped_worker_is_not_ready_and_nothing_hangs(start: Start) -> None:
    """SIGSTOP of the GPU worker: /ready says 503 within 6 s, requests fail rather than hang; SIGCONT heals it."""
    service = start()
    pid = service.worker_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as pool:
            hanging = pool.submit(service.speech, "Hello.")
            eventually(lambda: not service.is_ready(), 6, "/ready turning 503")
            assert hanging.result(15).status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert service.http.get("/health").status_code == httpx.codes.OK
    finally:
        os.kill(pid, signal.SIGCONT)
    eventually(service.is_ready, 10, "ready again")
    assert service.speech("Hello.").status_code == httpx.codes.OK


def kill_web_worker(pid: int) -> None:
    """Kill -9, until nothing is left of it: a zombie may still have threads, and with them its connections."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 5, "the web worker's death")


def test_killed_web_worker_is_replaced(start: Start) -> None:
    """Kill -9 of a web worker: the other one goes on at once, another takes its place, the GPU worker stays."""
    service = start(WEB_WORKERS=2)
    service.wait_serving(2)
    pid = service.worker_pid()
    victim = service.stats()["web_pid"]
    kill_web_worker(victim)
    assert service.speech("Hello.").status_code == httpx.codes.OK
    assert victim not in service.wait_serving(2)
    assert service.worker_pid() == pid


@pytest.mark.parametrize("web_workers", [1, 2])
def test_web_workers_killed_again_and_again_are_replaced(start: Start, web_workers: int) -> None:
    """Kill -9 of every web worker, then of every one that took a place, twice: the service goes on."""
    service = start(WEB_WORKERS=web_workers)
    pid = service.worker_pid()
    for _ in range(3):
        for victim in service.wait_serving(web_workers):
            kill_web_worker(victim)
    service.wait_serving(web_workers)
    assert service.speech("Hello.").status_code == httpx.codes.OK
    assert service.worker_pid() == pid
    assert service.stop() == 0


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}], ids=["bytes", "whole", "sse"])
def test_client_that_leaves_frees_its_slot(start: Start, fields: dict[str, object]) -> None:
    """A client that goes away while it is being answered, in any form, frees its slot within 500 ms."""
    service = start()
    connection = slow_reader(service, LONG, response_format="pcm", **fields)
    eventually(lambda: running(service) == 1, 5, "a slot taken")
    limit_s = stretched(0.5)
    connection.close()
    eventually(lambda: running(service) == 0, limit_s, "the slot freed")
    counted = service.stats()["requests"]
    assert (counted["cancelled"], counted["finished"]) == (1, 0)


def test_client_that_leaves_the_queue_is_forgotten(start: Start) -> None:
    """A client that goes away before its turn leaves the queue within 500 ms."""
    service = start(MAX_CONCURRENCY=1)
    holder = slow_reader(service, LONG, response_format="pcm")
    eventually(lambda: running(service) == 1, 5, "a slot taken")
    for fields in ({}, {"stream": False}, {"stream_format": "sse"}):
        waiting = slow_reader(service, "Hello.", **fields)
        eventually(lambda: service.stats()["queued"] == 1, 5, "a place in the queue")
        limit_s = stretched(0.5)
        waiting.close()
        eventually(lambda: service.stats()["queued"] == 0, limit_s, "the place given back")
    holder.close()
    eventually(lambda: running(service) == 0, limit_s, "the slot freed")


def test_client_that_reads_nothing_costs_little_and_delays_nobody(start: Start) -> None:
    """For 10 s somebody reads nothing: memory stays bounded, and others are answered as fast as ever."""
    service = start()
    service.speech(SENTENCES[0], stream=False)
    web = service.stats()["web_pid"]
    worker = service.worker_pid()
    idle = resident_bytes(web) + resident_bytes(worker)
    deaf = [slow_reader(service, LONG, response_format="pcm") for _ in range(4)]
    eventually(lambda: running(service) == 4, 5, "four slots taken")
    slowest = 0.0
    until = time.monotonic() + 10
    while time.monotonic() < until:
        began = time.monotonic()
        assert service.speech("Hello.").status_code == httpx.codes.OK
        slowest = max(slowest, time.monotonic() - began)
    limit_s = stretched(0.5)
    assert slowest < 2 * limit_s
    assert resident_bytes(web) + resident_bytes(worker) - idle < 80 * 2**20
    assert running(service) == 4
    for connection in deaf:
        connection.close()
    eventually(lambda: running(service) == 0, limit_s, "the slots freed")


def test_full_queue_is_a_429(start: Start) -> None:
    """More requests than may wait: 429 queue_full with Retry-After, place and estimate; those before are served."""
    service = start(MAX_CONCURRENCY=1, MAX_QUEUE=2)
    holder = slow_reader(service, LONG, response_format="pcm")
    eventually(lambda: running(service) == 1, 5, "a slot taken")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(service.speech, "Hello.") for _ in range(2)]
        eventually(lambda: service.stats()["queued"] == 2, 5, "a full queue")
        refused = service.speech("Hello.")
        assert refused.status_code == httpx.codes.TOO_MANY_REQUESTS
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        holder.close()
        assert [answer.result(20).status_code for answer in waiting] == [200, 200]
    eventually(lambda: service.stats()["requests"]["rejected"] == 1, 1, "the refusal counted")


def test_sigterm_lets_streams_complete_and_leaves_nothing(start: Start) -> None:
    """SIGTERM while streams run: each is heard to its end, new connections are refused, exit code 0, nobody left."""
    service = start(WEB_WORKERS=2)
    everyone = children_of(service.process.pid)
    text = " ".join(SENTENCES * 4)
    expected = len(service.speech(text, response_format="pcm", stream=False).content)
    heard: list[int] = []

    def listen() -> None:
        request = {"input": text, "response_format": "pcm"}
        with httpx.stream("POST", service.url + "/v1/audio/speech", json=request, timeout=30) as answer:
            count = 0
            for piece in answer.iter_raw(48_000):
                count += len(piece)
                time.sleep(0.02)  # a listener that takes its time
            heard.append(count)

    listeners = [threading.Thread(target=listen) for _ in range(3)]
    for listener in listeners:
        listener.start()
    eventually(lambda: running(service) == 3, 5, "three streams")
    service.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            httpx.get(service.url + "/health", timeout=1)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            pass  # accepted, and closed before it was answered: on its way to being refused
        return False

    eventually(refused, 10, "new connections refused")
    assert service.process.wait(40) == 0
    for listener in listeners:
        listener.join(5)
    assert heard == pytest.approx([expected] * 3, rel=0.001)
    assert not any(is_running(pid) for pid in everyone)


def test_killed_parent_takes_everyone_with_it(start: Start) -> None:
    """Kill -9 of the parent: neither the GPU worker nor a web worker stays behind."""
    service = start(WEB_WORKERS=2)
    everyone = children_of(service.process.pid)
    assert len(everyone) >= 3
    service.process.kill()
    service.process.wait()
    eventually(lambda: not any(is_running(pid) for pid in everyone), 10, "everyone gone")
