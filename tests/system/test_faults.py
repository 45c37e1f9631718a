"""Processes that die, stop or are ended, and clients that leave: only the requests concerned fail."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.recogniser import SENTENCES
from tests.system.service import (
    NO_TLS,
    START_TIMEOUT_S,
    Service,
    children_of,
    eventually,
    in_time,
    is_running,
    resident_bytes,
    running_service,
    slow_reader,
    soon,
)

Start = Callable[..., Service]

LONG = " ".join(SENTENCES * 20)
"""A quarter of an hour of speech, 43 MB: more than credits and socket buffers hold."""

SMALL_BUFFER = (socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
"""For a reader that is to notice the end of its stream soon: it comes behind what the kernel holds, megabytes else."""

BUFFER_MIB = 64
SLOTS = 4
QUEUE = 16


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two web workers. Each test may kill any process but the parent, and leaves a service that has recovered."""
    with running_service(tmp_path_factory.mktemp("pair"), WEB_WORKERS=2) as service:
        service.wait_serving(2)
        yield service


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One web worker, few slots and a small buffer. Each test leaves a service that works and has no requests."""
    few = {"AUDIO_BUFFER_MB": BUFFER_MIB, "MAX_CONCURRENCY": SLOTS, "MAX_QUEUE": QUEUE}
    with running_service(tmp_path_factory.mktemp("single"), **few) as service:
        yield service


def pieces(service: Service, fields: dict[str, str], *, http2: bool) -> Iterator[bytes]:
    """The pieces of a long answer as httpx reads them."""
    request = {"input": LONG, "response_format": "pcm", **fields}
    transport = httpx.HTTPTransport(http1=not http2, http2=http2, socket_options=[SMALL_BUFFER])
    with (
        httpx.Client(transport=transport, timeout=30) as client,
        client.stream("POST", service.url + "/v1/audio/speech", json=request) as answer,
    ):
        yield from answer.iter_raw(4800)


def lines(service: Service) -> Iterator[bytes]:
    """The lines of a long answer as Python's http.client reads them."""
    body = json.dumps({"input": LONG, "response_format": "pcm", "stream_format": "sse"})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", service.port)) as connection:
        connection.sock = socket.socket()
        connection.sock.setsockopt(*SMALL_BUFFER)
        connection.sock.settimeout(30)
        connection.sock.connect(("127.0.0.1", service.port))
        connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            yield from answer


def test_killed_worker_breaks_streams_and_comes_back(pair: Service) -> None:
    """Kill -9 of the GPU worker: streams break, new requests get 503 at once, speech is back within 3 s.

    The transfer breaks in every form, with HTTP/1.1 as with HTTP/2: no client takes the part for the whole.
    Neither does Python's http.client when it reads lines, which does not notice the missing last chunk.
    """
    pair.wait_serving(2)
    pid, restarts = pair.worker_pid(), pair.stats()["worker"]["restarts"]
    hearing: set[int] = set()
    broken: list[bytes] = []
    dead = threading.Event()

    def listen(number: int, answer: Iterator[bytes]) -> None:
        last = b""
        try:
            for piece in answer:
                last = (last + piece)[-1000:]
                hearing.add(number)
                dead.wait(0.01)  # slower than the worker
        except (OSError, http.client.HTTPException, httpx.TransportError):
            broken.append(last)

    forms: list[dict[str, str]] = [{}, {"stream_format": "sse"}]
    answers = [pieces(pair, fields, http2=http2) for fields in forms for http2 in (False, True)]
    answers.append(lines(pair))
    listeners = [threading.Thread(target=listen, args=numbered) for numbered in enumerate(answers)]
    for listener in listeners:
        listener.start()
    # The answer of a request of which nothing was spoken would be a 503, which is whole.
    eventually(lambda: len(hearing) == len(listeners), 60, "speech in every form")
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: not is_running(pid), 60, "the worker's death")
    dead.set()
    refused = pair.speech("Hello.")
    if refused.status_code != httpx.codes.OK:  # the new worker may be ready already
        assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
        assert refused.json()["error"]["code"] == "worker_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
    eventually(lambda: pair.speech("Hello.").status_code == httpx.codes.OK, 60, "speech again")
    assert in_time(time.monotonic() - killed, 3)
    for listener in listeners:
        listener.join(60)
    assert len(broken) == len(listeners), "a stream ended as if it were complete"
    assert not any(b"speech.audio.done" in last for last in broken)
    assert any(b"speech.audio.error" in last for last in broken), "the reset discarded the error event"
    assert pair.stats()["worker"]["restarts"] == restarts + 1


def kill_web_worker(pid: int) -> None:
    """Send SIGKILL and wait for the process to be gone: a zombie's threads may still hold its connections."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), 60, "the web worker's death")


def test_killed_web_worker_is_replaced(pair: Service) -> None:
    """Kill -9 of a web worker: the other one answers at once, a new one replaces it, the GPU worker stays."""
    pair.wait_serving(2)
    pid = pair.worker_pid()
    victim = pair.stats()["web_pid"]
    kill_web_worker(victim)
    assert pair.speech("Hello.").status_code == httpx.codes.OK
    assert victim not in pair.wait_serving(2)
    assert pair.worker_pid() == pid


def test_every_web_worker_tells_of_the_restarts(pair: Service) -> None:
    """Also one that started after the GPU worker's death."""
    pair.wait_serving(2)
    restarts = pair.stats()["worker"]["restarts"] + 1
    os.kill(killed := pair.worker_pid(), signal.SIGKILL)
    eventually(lambda: not is_running(killed), 60, "the worker's death")
    eventually(pair.is_ready, START_TIMEOUT_S, "ready again")
    witness, *_ = pair.wait_serving(2)
    os.kill(witness, signal.SIGKILL)
    reported: dict[int, int] = {}

    def two_others_report() -> bool:
        with contextlib.suppress(httpx.TransportError):
            stats = httpx.get(f"{pair.url}/admin/stats", timeout=2, trust_env=False, verify=NO_TLS)
            if stats.status_code == httpx.codes.OK:
                figures = httpx.get(f"{pair.url}/metrics", timeout=2, trust_env=False, verify=NO_TLS).text
                seen = [line for line in figures.splitlines() if line.startswith("tts_worker_restarts_total")]
                assert seen in ([], [f"tts_worker_restarts_total {restarts}.0"])
                reported[stats.json()["web_pid"]] = stats.json()["worker"]["restarts"]
        return len(reported.keys() - {witness}) == 2

    eventually(two_others_report, START_TIMEOUT_S, "two web workers")
    assert set(reported.values()) == {restarts}


@pytest.mark.parametrize(("name", "web_workers"), [pytest.param("single", 1, marks=pytest.mark.soak), ("pair", 2)])
def test_web_workers_killed_again_and_again_are_replaced(
    request: pytest.FixtureRequest, name: str, web_workers: int
) -> None:
    """Kill -9 of every web worker, then of each replacement: the service goes on."""
    service: Service = request.getfixturevalue(name)
    pid = service.worker_pid()
    for _ in range(2):
        for victim in service.wait_serving(web_workers):
            kill_web_worker(victim)
    service.wait_serving(web_workers)
    assert service.speech("Hello.").status_code == httpx.codes.OK
    assert service.worker_pid() == pid


@pytest.mark.parametrize("fields", [{}, {"stream": False}, {"stream_format": "sse"}], ids=["bytes", "whole", "sse"])
def test_client_that_leaves_frees_its_slot(single: Service, fields: dict[str, object]) -> None:
    """A client that disconnects during its answer, in any form, frees its slot within 500 ms."""
    before = single.fresh_stats()["requests"]
    connection = slow_reader(single, LONG, response_format="pcm", **fields)
    eventually(lambda: single.running() == 1, 60, "a slot taken")
    connection.close()
    soon(lambda: single.running() == 0, 0.5, lambda: f"the slot freed; {before}, now {single.stats()}")
    counted = single.stats()["requests"]
    assert counted["cancelled"] == before["cancelled"] + 1
    assert counted["finished"] == before["finished"]


def test_clients_that_read_nothing_cost_little_and_delay_no_other(single: Service) -> None:
    """Three times as many as there are slots: memory stays bounded, and other requests are as fast as ever.

    The buffer holds the speech of one of them and half of another's.
    """
    single.speech(SENTENCES[0], stream=False)
    web = single.stats()["web_pid"]
    worker = single.worker_pid()
    idle = resident_bytes(web) + resident_bytes(worker)
    deaf = [slow_reader(single, LONG, response_format="pcm") for _ in range(3 * SLOTS)]
    eventually(lambda: single.open_requests() == len(deaf), 60, "all requests")
    slowest = 0.0
    for _ in range(10):
        began = time.monotonic()
        assert single.speech("Hello.").status_code == httpx.codes.OK
        slowest = max(slowest, time.monotonic() - began)
    assert in_time(slowest, 1.0)
    assert resident_bytes(web) + resident_bytes(worker) - idle < (80 + BUFFER_MIB) * 2**20
    stats = single.stats()
    assert stats["audio_buffer"]["used_bytes"] <= stats["audio_buffer"]["budget_bytes"] == BUFFER_MIB * 2**20
    for connection in deaf:
        connection.close()
    soon(lambda: single.open_requests() == 0, 0.5, "the buffer freed")


def test_burst_fills_the_slots_before_the_queue(single: Service) -> None:
    """Forty requests at once, four slots, a queue of sixteen: twenty are answered, and the rest is a 429.

    A request that comes late on a busy machine may find that the queue has room again.
    """
    pid = single.worker_pid()
    with ThreadPoolExecutor(40) as pool:
        os.kill(pid, signal.SIGSTOP)  # so that all forty reach it in the same moment
        try:
            body = {"response_format": "pcm", "stream": False}
            asked = [pool.submit(single.speech, SENTENCES[0], **body) for _ in range(40)]
            time.sleep(0.7)  # no test can see how many requests wait in the worker's socket
        finally:
            os.kill(pid, signal.SIGCONT)
        answers = [one.result(60) for one in asked]
    refused = [answer for answer in answers if answer.status_code == httpx.codes.TOO_MANY_REQUESTS]
    assert 0 < len(refused) <= 40 - SLOTS - QUEUE
    assert {answer.status_code for answer in answers if answer not in refused} == {httpx.codes.OK}
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1


def _watch(service: Service, watched: list[str]) -> None:
    """Collect the lines that a dashboard gets, and at last the word that they ended."""
    with httpx.stream("GET", service.url + "/admin/events", timeout=30) as answer:
        for line in answer.iter_lines():
            watched.append(line.removeprefix("data: "))
    watched.append("the end")


def test_a_second_ctrl_c_does_not_wait_for_streams(start: Start) -> None:
    """The first lets them end, and so does a SIGTERM after it; the second Ctrl-C leaves no process within seconds."""
    service = start(WEB_WORKERS=2, DRAIN_TIMEOUT=60)
    service.wait_serving(2)
    processes = children_of(service.process.pid)
    stream = slow_reader(service, LONG, response_format="pcm")
    eventually(lambda: service.running() == 1, 60, "a stream")
    for number in (signal.SIGINT, signal.SIGTERM):
        service.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            service.process.wait(1)
    service.process.send_signal(signal.SIGINT)
    soon(lambda: not any(map(is_running, [service.process.pid, *processes])), 3.0, "no process left")
    assert service.process.wait() == 0
    stream.close()


def test_sigterm_lets_streams_complete_and_leaves_nothing(start: Start) -> None:
    """SIGTERM during streams: they complete, new connections are refused, exit code 0, no process is left.

    The stream of a dashboard has no end of its own: it ends at once, as whole as the others.
    Every process gets the signal, as systemd sends it; the web workers get a second one from the main process.
    """
    service = start(WEB_WORKERS=2)
    service.wait_serving(2)
    processes = children_of(service.process.pid)
    text = " ".join(SENTENCES * 3)  # 7 MB are more than the kernel's buffers hold
    expected = len(service.speech(text, response_format="pcm", stream=False).content)
    heard: list[int] = []
    stopping = threading.Event()

    def listen() -> None:
        request = {"input": text, "response_format": "pcm"}
        transport = httpx.HTTPTransport(socket_options=[SMALL_BUFFER])
        with (
            httpx.Client(transport=transport, timeout=60) as http,
            http.stream("POST", service.url + "/v1/audio/speech", json=request) as answer,
        ):
            pieces = answer.iter_raw(48_000)
            count = len(next(pieces))
            stopping.wait(60)
            heard.append(count + sum(map(len, pieces)))

    watched: list[str] = []
    listeners = [threading.Thread(target=_watch, args=(service, watched))]
    listeners += [threading.Thread(target=listen) for _ in range(3)]
    for listener in listeners:
        listener.start()
    eventually(lambda: service.open_requests() == 3, 60, "three streams")
    eventually(lambda: watched, 60, "a dashboard")
    for pid in (*processes, service.process.pid):
        os.kill(pid, signal.SIGTERM)

    def refused() -> bool:
        try:
            httpx.get(service.url + "/health", timeout=1)
        except httpx.ConnectError:
            return True
        except httpx.TransportError:
            pass  # accepted, and closed without an answer: the next one may be refused
        return False

    eventually(refused, 60, "new connections refused")
    stopping.set()
    assert service.process.wait(60) == 0
    for listener in listeners:
        listener.join(60)
    assert heard == pytest.approx([expected] * 3, rel=0.001)
    assert watched[-1] == "the end"
    assert any('"problem":null' in line for line in watched)
    assert not any(is_running(pid) for pid in processes)


def test_killed_parent_takes_its_children_along(start: Start) -> None:
    """Kill -9 of the parent: neither the GPU worker nor a web worker stays behind."""
    service = start()
    processes = children_of(service.process.pid)
    assert len(processes) >= 2
    service.process.kill()
    service.process.wait()
    eventually(lambda: not any(is_running(pid) for pid in processes), 60, "no process left")
