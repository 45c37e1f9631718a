"""Readers that take their time, on the real processes: they keep nobody else from a slot, and lose nothing."""

import asyncio
import contextlib
import json
import socket
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest

from shared.pcm import bytes_for
from tests.checkpoints import tiny
from tests.system.service import Service, eventually, resident_bytes, running_service, slow_reader, stretched

MODEL: Final = "qwen3-tts-0.6b-customvoice"
SLOTS: Final = 8
STALLED: Final = 3 * SLOTS
TEXT: Final = "The old clock struck midnight, and nobody in the house was awake to hear it. " * 52
"""4,004 characters."""

VOICES: Final = 3
"""Different answers: each is asked for as a whole once, and the readers' bytes are compared with that."""

BYTES_PER_S: Final = bytes_for(1.0)


@contextlib.contextmanager
def qwen_service(directory: Path, **settings: object) -> Iterator[Service]:
    """A service with a small Qwen3-TTS model of eight slots."""
    plain = {
        "DEFAULT_MODEL": MODEL,
        "DEFAULT_DEVICE": "cpu",
        "MODEL_PATHS": f"{MODEL}={tiny('custom_voice').resolve()}",
        "MAX_CONCURRENCY": SLOTS,
        "MAX_QUEUE": 1_000,
        "LOG_LEVEL": "warning",
    }
    with running_service(directory, **(plain | settings)) as service:
        yield service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the smallest buffer."""
    with qwen_service(tmp_path_factory.mktemp("readers"), AUDIO_BUFFER_MB=16) as service:
        yield service


def body(number: int, frames: int | None) -> dict[str, Any]:
    """The request of a reader; those whose numbers differ by VOICES ask for the same speech."""
    sampling = {"seed": number % VOICES, "max_new_tokens": frames}
    return {"input": TEXT, "voice": "ryan", "response_format": "pcm", **sampling}


@pytest.mark.soak
def test_stalled_readers_keep_nobody_waiting(service: Service) -> None:
    """24 clients read nothing, on eight slots and with the smallest buffer: another one is answered within seconds.

    The buffer keeps within its budget, whatever the clients do.
    """
    with contextlib.ExitStack() as readers:
        for number in range(STALLED):
            readers.enter_context(slow_reader(service, TEXT, response_format="pcm", seed=number))
        eventually(lambda: service.running() + service.stats()["buffered"] == STALLED, 60, "every reader started")
        began = time.monotonic()
        answer = service.speech("Hi.", response_format="pcm", max_new_tokens=25)
        assert answer.status_code == httpx.codes.OK
        assert time.monotonic() - began < stretched(4)
        # The answer counts until its last credit has come back.
        eventually(
            lambda: service.running() + service.stats()["buffered"] == STALLED, stretched(5), "the answer forgotten"
        )
        stats = service.stats()
        assert (stats["slots"], stats["queued"]) == (SLOTS, 0)
        assert stats["buffered"] >= STALLED - SLOTS
        assert stats["audio_buffer"]["used_bytes"] <= stats["audio_buffer"]["budget_bytes"] == 16 * 2**20
    eventually(lambda: service.running() == 0 == service.stats()["buffered"], 60, "every reader gone")


class Reader(msgspec.Struct):
    """The audio that one client has read. `speed` is in seconds of speech a second; None: as fast as it comes."""

    number: int
    speed: float | None
    first_s: float = 0.0
    pcm: bytes = b""


async def read(service: Service, reader: Reader, request: dict[str, Any]) -> None:
    """Ask for speech, and read it at the reader's speed through small socket buffers."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", service.port))
    stream, writer = await asyncio.open_connection(sock=connection, limit=16 * 1024)
    content = json.dumps(request).encode()
    head = "POST /v1/audio/speech HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    began = time.monotonic()
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    status = await stream.readuntil(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), status
    pieces, size, first_at = [], 0, 0.0
    while length := int(await stream.readuntil(b"\r\n"), 16):
        pieces.append(await stream.readexactly(length))
        await stream.readexactly(2)
        if not size:
            first_at = time.monotonic()
            reader.first_s = first_at - began
        size += length
        if reader.speed is not None:
            await asyncio.sleep(size / BYTES_PER_S / reader.speed - (time.monotonic() - first_at))
    reader.pcm = b"".join(pieces)
    writer.close()


def greeting(number: int) -> dict[str, Any]:
    """The request of a newcomer."""
    return body(number, 12) | {"input": "Good morning."}


async def newcomers(service: Service, every_s: float, until: asyncio.Event) -> list[Reader]:
    """Ask for a short text every `every_s` seconds, until the event."""
    came: list[asyncio.Task[None]] = []
    readers = []
    while not until.is_set():
        reader = Reader(number=len(readers), speed=None)
        readers.append(reader)
        came.append(asyncio.create_task(read(service, reader, greeting(reader.number))))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(until.wait(), every_s)
    await asyncio.gather(*came)
    return readers


async def idle_first_s(service: Service) -> list[float]:
    """The time to the first audio of an idle service, sorted."""
    found = []
    for number in range(20):
        reader = Reader(number=number, speed=None)
        await read(service, reader, greeting(number))
        found.append(reader.first_s)
    return sorted(found)


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """So many readers of speech of so many frames at so many seconds a second, and a newcomer every `every_s`."""

    readers: int
    frames: int
    speed: float
    every_s: float


class Peaks(msgspec.Struct):
    """The largest figures that were seen."""

    buffer_bytes: int = 0
    worker_bytes: int = 0
    buffered: int = 0

    async def watch(self, service: Service, worker: int) -> None:
        """Look several times a second, until cancelled."""
        while True:
            stats = await asyncio.to_thread(service.stats)
            self.buffer_bytes = max(self.buffer_bytes, stats["audio_buffer"]["used_bytes"])
            self.buffered = max(self.buffered, stats["buffered"])
            self.worker_bytes = max(self.worker_bytes, resident_bytes(worker))
            await asyncio.sleep(0.1)


@pytest.mark.soak
async def test_slow_readers_share_the_slots(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Readers at a steady speed, twice as many as slots, all get a slot, and newcomers are heard at once.

    Every reader gets the bytes of the whole answer, and the buffer keeps within its budget.
    """
    # Slow enough that a machine three times slower makes all of it in time: then the slots decide who waits.
    await listen(service, Crowd(readers=2 * SLOTS, frames=50, speed=1.0, every_s=0.5), capsys)


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_two_hundred_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same with 200 readers at the speed of speech, and 20 newcomers a minute."""
    with qwen_service(tmp_path) as service:
        await listen(service, Crowd(readers=200, frames=750, speed=1.0, every_s=3.0), capsys)


async def listen(service: Service, crowd: Crowd, capsys: pytest.CaptureFixture[str]) -> None:
    """Let the crowd listen, check all that it hears, and print the figures."""
    whole = [_whole(service, body(number, crowd.frames)) for number in range(VOICES)]
    short = [_whole(service, greeting(number)) for number in range(VOICES)]
    idle = await idle_first_s(service)
    worker = service.worker_pid()
    before_bytes, peaks = resident_bytes(worker), Peaks()
    watching = asyncio.create_task(peaks.watch(service, worker))
    began = time.monotonic()
    started_before = service.stats()["requests"]["started"]
    slow = [Reader(number=number, speed=crowd.speed) for number in range(crowd.readers)]
    reading = [asyncio.create_task(read(service, one, body(one.number, crowd.frames))) for one in slow]
    while (await asyncio.to_thread(service.stats))["requests"]["started"] < started_before + crowd.readers:
        took_s = time.monotonic() - began
        assert took_s < 120 or took_s < stretched(120)  # measuring takes 100 ms of the readers' time
        await asyncio.sleep(0.05)
    all_started_s, done = time.monotonic() - began, asyncio.Event()
    coming = asyncio.create_task(newcomers(service, crowd.every_s, done))
    await asyncio.gather(*reading)
    done.set()
    fast = await coming
    watching.cancel()
    stats = service.stats()
    for one in slow:
        assert one.pcm == whole[one.number % VOICES]
    for one in fast:
        assert one.pcm == short[one.number % VOICES]
    came = sorted(one.first_s for one in fast)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{crowd}, speech of {len(whole[0]) / BYTES_PER_S:.0f} s; all had a slot after {all_started_s:.1f} s"
            f"\nfirst audio, ms p50 / p95 / most: idle {_quantiles(idle)}, {len(came)} newcomers {_quantiles(came)}"
            f"\nat most {peaks.buffered} buffered in {peaks.buffer_bytes / 2**20:.0f} MB; "
            f"worker +{(peaks.worker_bytes - before_bytes) / 2**20:.0f} MB; {time.monotonic() - began:.0f} s\n"
        )
    assert peaks.buffer_bytes <= stats["audio_buffer"]["budget_bytes"]
    assert (stats["requests"]["failed"], stats["requests"]["rejected"], stats["queued"]) == (0, 0, 0)
    assert statistics.median(came) < stretched(max(0.5, 4 * statistics.median(idle)))


def _whole(service: Service, request: dict[str, Any]) -> bytes:
    return service.http.post("/v1/audio/speech", json=request | {"stream": False}).content


def _quantiles(seconds: Sequence[float]) -> str:
    """p50, p95 and the largest, in milliseconds."""
    return " / ".join(f"{1000 * seconds[int(share * (len(seconds) - 1))]:.0f}" for share in (0.5, 0.95, 1.0))
