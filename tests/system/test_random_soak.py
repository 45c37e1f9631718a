"""Ordinary life at random: slow readers, stalled ones, clients that leave, idle and dripping connections,
web workers and GPU workers that pause, hang or are killed. At the end nothing is left, and the counters add up.

A run draws a seed and prints it. SOAK_SEED repeats it, and SOAK_S sets its length.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.recogniser import SENTENCES
from tests.system.service import (
    START_TIMEOUT_S,
    Service,
    children_of,
    eventually,
    is_running,
    resident_bytes,
    slow_reader,
)

LENGTH_S: Final = float(os.environ.get("SOAK_S", "1800"))
TEXT: Final = " ".join(SENTENCES * 2)
"""Some thirty seconds of speech."""

WORKER_TIMEOUT_S: Final = 10
"""A process that is stopped for good is replaced after so long."""

CALM_REQUESTS: Final = 12
MORE_FDS: Final = 12
"""File descriptors that a process may have more than at the start: kept connections, and pipes of new processes."""

MORE_BYTES: Final = 150 * 2**20
"""Memory that a process may take more than at the start."""


class Life:
    """Clients and mishaps at random, from one seed, until `until` (monotonic seconds)."""

    def __init__(self, service: Service, seed: int, whole_bytes: int, until: float) -> None:
        self._service = service
        self._random = random.Random(seed)  # noqa: S311 -- the same run again, not a secret
        self._whole_bytes = whole_bytes
        self._until = until
        self.outcomes: Counter[str] = Counter()

    async def run(self) -> None:
        """Live until the end; raises the AssertionError of the first client that got a part for the whole."""
        kinds = [*[self._reader] * 6, self._player, self._player, self._leaver, self._leaver]
        kinds += [self._stalled, self._idle, self._idle, self._dripping, self._mishap]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=4)
        async with (
            httpx.AsyncClient(base_url=self._service.url, timeout=60, trust_env=False, limits=limits) as http,
            asyncio.TaskGroup() as group,
        ):
            for kind in kinds:
                group.create_task(self._again(kind, http))

    async def _again(self, kind: Callable[[httpx.AsyncClient], Awaitable[None]], http: httpx.AsyncClient) -> None:
        while time.monotonic() < self._until:
            await asyncio.sleep(self._random.uniform(0, 0.3))
            try:
                await kind(http)
            except (httpx.TransportError, OSError) as error:
                self.outcomes[f"{kind.__name__}: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)  # a service without web workers refuses each connection at once

    async def _reader(self, http: httpx.AsyncClient) -> None:
        """Read an answer as fast as it comes, in one of its forms."""
        form = self._random.choice([{}, {"stream": False}, {"stream_format": "sse"}])
        await self._listen(http, form, pause_s=0.0)

    async def _player(self, http: httpx.AsyncClient) -> None:
        """Read a stream slowly, as a player does."""
        await self._listen(http, {}, pause_s=self._random.uniform(0.02, 0.1))

    async def _listen(self, http: httpx.AsyncClient, form: dict[str, object], *, pause_s: float) -> None:
        body = {"input": TEXT, "response_format": "pcm", **form}
        received, tail = 0, b""
        async with http.stream("POST", "/v1/audio/speech", json=body) as answer:
            async for piece in answer.aiter_raw(48_000):
                received, tail = received + len(piece), (tail + piece)[-2000:]
                if pause_s:
                    await asyncio.sleep(pause_s)
        self.outcomes[f"{answer.status_code}"] += 1
        if answer.status_code != httpx.codes.OK:
            assert answer.status_code in {429, 503}, tail
            assert json.loads(tail)["error"]["code"], tail
            await asyncio.sleep(self._random.uniform(0.1, 1))
        elif "stream_format" in form:
            assert b"speech.audio.done" in tail, tail
        else:
            assert received == pytest.approx(self._whole_bytes, rel=0.01), "a part was taken for the whole"

    async def _leaver(self, http: httpx.AsyncClient) -> None:
        """Disconnect at any moment."""
        form = self._random.choice([{}, {"stream": False}, {"stream_format": "sse"}])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0, 0.3)):
                await self._listen(http, form, pause_s=0.05)
        self.outcomes["left"] += 1

    async def _stalled(self, _http: httpx.AsyncClient) -> None:
        """Read nothing for a while, then disconnect."""
        connection = await asyncio.to_thread(slow_reader, self._service, TEXT * 20, response_format="pcm")
        await asyncio.sleep(self._random.uniform(0.5, 3))
        connection.close()
        self.outcomes["stalled"] += 1

    async def _idle(self, _http: httpx.AsyncClient) -> None:
        """Connect and send nothing."""
        _, writer = await asyncio.open_connection("127.0.0.1", self._service.port)
        await asyncio.sleep(self._random.uniform(0, 3))
        writer.close()
        self.outcomes["idle"] += 1

    async def _dripping(self, _http: httpx.AsyncClient) -> None:
        """Send a request byte by byte, and leave before its end."""
        _, writer = await asyncio.open_connection("127.0.0.1", self._service.port)
        with contextlib.closing(writer):
            request = b"POST /v1/audio/speech HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
            for byte in request[: self._random.randint(1, 55)]:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
        self.outcomes["dripped"] += 1

    async def _mishap(self, _http: httpx.AsyncClient) -> None:
        """Pause, hang or kill a process; the GPU worker is seldom lost, because all wait for its start."""
        await asyncio.sleep(self._random.uniform(0.5, 4))
        children = children_of(self._service.process.pid)
        worker = {pid for pid in children if b"gpu_worker" in _command_line(pid)}
        victims = worker if self._random.random() < 0.5 else children - worker
        if not victims:
            return
        victim = self._random.choice(sorted(victims))
        weights = [17, 2, 1] if victims is worker else [12, 6, 2]
        kind = self._random.choices(["pause", "kill", "hang"], weights)[0]
        name = "the GPU worker" if victims is worker else "a web worker"
        self.outcomes[f"{kind} {name}"] += 1
        with contextlib.suppress(ProcessLookupError):
            if kind == "kill":
                os.kill(victim, signal.SIGKILL)
                return
            os.kill(victim, signal.SIGSTOP)
            if kind == "pause":
                await asyncio.sleep(self._random.uniform(0.1, 2))
            else:
                with contextlib.suppress(AssertionError):  # one that starts may be silent for longer
                    await asyncio.to_thread(eventually, lambda: not is_running(victim), 3 * WORKER_TIMEOUT_S, "its end")
            os.kill(victim, signal.SIGCONT)


@pytest.mark.soak
@pytest.mark.timeout(LENGTH_S + 300)
def test_life_at_random_leaves_nothing(start: Callable[..., Service]) -> None:
    """No client takes a part for the whole; afterwards slots, processes, files and memory are as before.

    Then every request of a calm while is counted once, by its outcome.
    """
    seed = int(os.environ.get("SOAK_SEED", "") or random.SystemRandom().randrange(10**6))
    print(f"SOAK_SEED={seed}")  # noqa: T201 -- pytest shows it when the test fails
    limits = {"MAX_CONCURRENCY": 8, "MAX_QUEUE": 16, "WORKER_TIMEOUT": WORKER_TIMEOUT_S}
    service = start(WEB_WORKERS=2, LOG_LEVEL="warning", **limits)
    whole_bytes = len(service.speech(TEXT, response_format="pcm", stream=False).content)
    service.wait_serving(2)
    before = usage(service)
    life = Life(service, seed, whole_bytes, time.monotonic() + LENGTH_S)
    asyncio.run(life.run())
    print(life.outcomes)  # noqa: T201
    assert life.outcomes["200"] > 0
    eventually(service.is_ready, START_TIMEOUT_S, "ready again")
    service.wait_serving(2)
    eventually(lambda: idle(service), 60, "no request left")
    calm(service)
    eventually(lambda: len(children_of(service.process.pid)) == len(before) - 1, 60, "as many processes as before")

    def as_before() -> bool:
        most_fds = max(fds for fds, _ in before)
        most_bytes = max(size for _, size in before)
        now = usage(service)
        return all(fds <= most_fds + MORE_FDS and size <= most_bytes + MORE_BYTES for fds, size in now)

    eventually(as_before, 60, lambda: f"before {before}, now {usage(service)}")
    log, hung = service.log.read_text(), life.outcomes
    print({event: log.count(event) for event in ("web_worker_hangs", " worker_hangs", "worker_died")})  # noqa: T201
    # One that hung while it started was let go on.
    assert log.count("web_worker_hangs") <= hung["hang a web worker"], "a healthy web worker was replaced"
    assert log.count(" worker_hangs") <= hung["hang the GPU worker"], "a healthy GPU worker was replaced"


def calm(service: Service) -> None:
    """Requests without mishaps, some of which leave: each is counted once, and the counters add up."""
    counters_before = counters(service)
    for number in range(CALM_REQUESTS):
        assert service.speech(SENTENCES[number], stream=False).status_code == httpx.codes.OK
    for _ in range(3):
        connection = slow_reader(service, TEXT * 20, response_format="pcm")
        eventually(lambda: any(stream["audio_s"] for stream in service.stats()["streams"]), 60, "a stream")
        connection.close()
        eventually(lambda: idle(service), 60, "the stream ended")

    def counted() -> bool:
        now = counters(service)
        more = {name: now[name] - counters_before[name] for name in now}
        ended = more["finished"] + more["failed"] + more["cancelled"]
        return (
            more["started"] == ended == CALM_REQUESTS + 3
            and more["finished"] >= CALM_REQUESTS
            and more["failed"] == more["rejected"] == 0
        )

    eventually(counted, 60, lambda: f"before {counters_before}, now {counters(service)}")
    total = counters(service)
    # A request that was cancelled or failed in the queue has not started.
    assert total["finished"] <= total["started"] <= total["finished"] + total["failed"] + total["cancelled"], total


def counters(service: Service) -> dict[str, int]:
    """The numbers of requests that have started, and by how they ended."""
    found: dict[str, int] = service.stats()["requests"]
    return found


def idle(service: Service) -> bool:
    """True if no request is left in any state."""
    stats: dict[str, Any] = service.stats()
    return bool(stats["running"] == stats["queued"] == 0 and not stats["streams"])


def usage(service: Service) -> list[tuple[int, int]]:
    """Open files and resident bytes of each process of the service."""
    found = []
    for pid in [service.process.pid, *children_of(service.process.pid)]:
        with contextlib.suppress(OSError):
            found.append((len(list(Path(f"/proc/{pid}/fd").iterdir())), resident_bytes(pid)))
    return found


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
