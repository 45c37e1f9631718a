"""Connections that ask for nothing shut nobody out of the real service, and no address takes all places."""

import asyncio
import contextlib
import resource
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.server.running import HANDSHAKE
from tests.system.service import ROOT, Service, eventually, resident_bytes, running_service

FIRST_BYTES: Final = {
    "idle": b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "body": b"POST /v1/audio/speech HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n{",
}
"""The first bytes of a connection of each kind; tests/server/processes/test_connection_reaper.py has more kinds."""

PLACES: Final = 64
"""TTS_MAX_CONNECTIONS of the shared service."""

PART_BYTES: Final = 300_000

ADDRESS_LIMIT: Final = 4
"""TTS_MAX_CONNECTIONS_PER_ADDRESS of the shared service, which trusts 127.0.0.1 as a proxy."""

MOST_BYTES_HELD: Final = 200_000_000
"""A web worker may hold so much of the memory that a crowd has cost: the C library keeps some for the next one."""


@contextlib.contextmanager
def connections(
    service: Service, number: int, first: bytes, source: str = "127.0.0.1"
) -> Iterator[list[socket.socket]]:
    """So many open connections, each of which has sent its first bytes."""
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(number):
            one = stack.enter_context(socket.socket())
            one.bind((source, 0))
            one.connect(("127.0.0.1", service.port))
            one.sendall(first)
            one.setblocking(False)
            opened.append(one)
        yield opened


def is_open(connection: socket.socket) -> bool:
    """True if the server has not closed the connection. Reads all that the server has sent."""
    try:
        while connection.recv(4096):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    return False


def descriptors(service: Service) -> int:
    """The open file descriptors of all web workers."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in service.web_pids())


def wait_for_descriptors(service: Service, before: int) -> None:
    """Wait until the web workers hold as many descriptors as before, and few for connections of the tests' own."""
    eventually(lambda: descriptors(service) <= before + 8, 60, "the connections closed")


def answers(service: Service) -> None:
    """A new connection is answered."""
    assert httpx.get(f"{service.url}/health", timeout=60, trust_env=False).status_code == httpx.codes.OK


@contextlib.contextmanager
def slow_upload(service: Service) -> Iterator[socket.socket]:
    """An upload that is told to go on (as curl asks for large ones), and has two parts of PART_BYTES left to send."""
    head = {"Host": "localhost", "Expect": "100-continue", "Connection": "close", "Content-Length": 3 * PART_BYTES}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as upload:
        upload.sendall(f"POST /v1/audio/speech HTTP/1.1\r\n{lines}\r\n".encode())
        assert upload.recv(100).startswith(b"HTTP/1.1 100 Continue")
        upload.sendall(b" " * PART_BYTES)
        yield upload


@pytest.mark.parametrize("kind", ["idle", pytest.param("body", marks=pytest.mark.soak)])
def test_a_crowd_shuts_nobody_out(shared_service: Service, kind: str) -> None:
    """Among more connections than there are places a new one is answered; afterwards none is left.

    No stream and no upload that began before is cut, though nothing is read or sent while the crowd comes.
    """
    before = descriptors(shared_service)
    with (
        shared_service.stream("Hello. " * 500, response_format="pcm") as stream,
        slow_upload(shared_service) as upload,
    ):
        pieces = stream.iter_raw()
        received = len(next(pieces))
        with connections(shared_service, PLACES + PLACES // 2, FIRST_BYTES[kind]):
            answers(shared_service)
            handshake = httpx.get(f"{shared_service.url}/ws", headers=HANDSHAKE, timeout=60, trust_env=False)
            upload.sendall(b" " * PART_BYTES)
            for _ in range(3):
                answers(shared_service)
        upload.sendall(b'{"input": "Hello."}'.rjust(PART_BYTES))
        said = b"".join(iter(lambda: upload.recv(65_536), b""))
        received += sum(map(len, pieces))
    assert handshake.status_code == httpx.codes.NOT_FOUND
    assert said.startswith(b"HTTP/1.1 200")
    assert received > 500 * 10_000
    wait_for_descriptors(shared_service, before)


def test_an_address_keeps_few_connections(shared_service: Service) -> None:
    """An address keeps its number of connections in each of the two web workers, and a trusted proxy more."""
    more = 2 * ADDRESS_LIMIT + 2  # and even in one web worker fewer than are closed for room
    with (
        connections(shared_service, more, FIRST_BYTES["idle"]) as of_proxy,
        connections(shared_service, more, FIRST_BYTES["idle"], "127.0.1.1") as of_client,
    ):
        left = of_client

        def few() -> bool:
            nonlocal left
            left = [each for each in left if is_open(each)]
            return len(left) <= 2 * ADDRESS_LIMIT

        eventually(few, 60, "the connections above the limit closed")
        assert all(is_open(each) for each in of_proxy)
        assert left


# --- the large crowd -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def crowd(service: Service, kind: str, number: int) -> Iterator[None]:
    """A process that opens so many connections of a kind of crowd.py, and again those that the server closes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.system.crowd", kind, str(service.port), str(number)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
    )
    assert process.stdin
    try:
        yield
    finally:
        process.stdin.close()
        process.kill()
        process.wait()


TLS: Final = ssl.create_default_context()
"""Shared, because httpx would make one for each client, which takes 30 ms."""


async def _honest(service: Service, number: int, latencies: list[float], answered: Counter[int | str]) -> None:
    """One honest client, which keeps its connection; every twentieth asks for speech once.

    A hundred come in a second. As OpenAI's SDK does, a client repeats a request twice whose connection was closed:
    all of them share one process, which may send a request a second after it has connected.
    """
    await asyncio.sleep(number / 100)
    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False, verify=TLS) as client:
        for turn in range(6):
            began, speaks = time.monotonic(), turn == 1 and number % 20 == 0
            for _ in range(3):
                try:
                    if speaks:
                        answer = await client.post("/v1/audio/speech", json={"input": "Hello."})
                    else:
                        answer = await client.get("/health")
                    answered[answer.status_code] += 1
                    break
                except httpx.TransportError:
                    answered["repeated"] += 1
            if not speaks:
                latencies.append(time.monotonic() - began)
            await asyncio.sleep(2)


def _figures(latencies: list[float]) -> str:
    """Percentiles of GET /health in milliseconds."""
    ordered = sorted(latencies)
    p50, p99, most = (ordered[min(len(ordered) * part // 100, len(ordered) - 1)] * 1000 for part in (50, 99, 100))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {most:.0f} ms"


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_twenty_thousand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Among 20,000 idle and 2,000 dripping connections 1,000 honest ones are answered, and nothing leaks.

    Of a hundred requests one may fail three times: on a busy machine this process sends some too late each time.
    """
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 12_000:
        pytest.skip("a process needs 12,000 file descriptors")
    with running_service(tmp_path, DEFAULT_MODEL="espeak-ng") as service:
        assert service.speech("Hello.").status_code == httpx.codes.OK
        before, (pid, *_) = descriptors(service), service.web_pids()
        memory = resident_bytes(pid)
        answered: Counter[int | str] = Counter()

        async def honest(number: int) -> list[float]:
            latencies: list[float] = []
            await asyncio.gather(*(_honest(service, each, latencies, answered) for each in range(number)))
            return latencies

        with contextlib.ExitStack() as crowds:
            for kind, number in {"body": 2_000, "idle": 10_000, "silent": 10_000}.items():
                crowds.enter_context(crowd(service, kind, number))
            while_it_comes = asyncio.run(honest(100))
            time.sleep(10)  # the crowd gets its places, or what is left of them
            among_it = asyncio.run(honest(1_000))
            peak = resident_bytes(pid)
        eventually(lambda: descriptors(service) <= before + 8, 60, "the connections closed")
        figures = f"""
            100 honest connections while the crowd comes: {_figures(while_it_comes)}
            1,000 honest connections among the crowd: {_figures(among_it)}
            answers: {dict(answered)}
            web worker: {memory / 1e6:.0f} MB, with the crowd {peak / 1e6:.0f}, after {resident_bytes(pid) / 1e6:.0f} MB
            descriptors: {before} before, {descriptors(service)} after"""
        with capsys.disabled():
            print(figures)  # noqa: T201 - the figures are what a reader of this run wants
        assert set(answered) <= {200, 429, "repeated"}
        assert answered[200] + answered[429] >= 0.99 * 6 * 1_100
        assert resident_bytes(pid) < memory + MOST_BYTES_HELD
