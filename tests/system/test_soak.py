"""Many requests, half of them cancelled: memory stays flat, every slot is freed, every request is counted.

The long runs are marked `soak`; every run of the suite has a short one over HTTP.
"""

import asyncio
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import httpx
import msgspec
import pytest

from shared.protocol import (
    Audio,
    Cancel,
    Failed,
    Finished,
    Message,
    Ping,
    Pong,
    Sampling,
    Segment,
    Snapshot,
    Speak,
    Started,
)
from tests.checkpoints import tiny
from tests.recogniser import SENTENCES
from tests.system.residency_service import EXACT_MALLOC
from tests.system.service import Service, eventually, resident_bytes, running_worker
from tests.system.worker_client import WorkerClient

MODEL: Final = "qwen3-tts-0.6b-customvoice"
SLOTS: Final = 8
OPEN_REQUESTS: Final = 24
"""Open requests at once: three times the number of slots, so that the queue is used as well."""

CancelAt = Literal["never", "at once", "Started", "Audio"]
CANCEL_AT: Final[Sequence[CancelAt]] = ("never", "never", "never", "at once", "Started", "Audio")
"""The moment at which the client cancels a request; drawn for each request."""

FORMATS: Final = ("mp3", "opus", "aac", "flac", "wav", "pcm")
FORMS: Final[Sequence[dict[str, object]]] = ({}, {"stream": False}, {"stream_format": "sse"})
ROUNDS: Final = 12
"""Readings of the memory; a test says how many requests lie between two of them."""


class Tally(msgspec.Struct):
    """The numbers of requests by how they ended, as the client counts them."""

    finished: int = 0
    cancelled: int = 0


class LoadClient:
    """Keeps OPEN_REQUESTS requests open at a GPU worker and cancels some of them."""

    def __init__(self, worker: WorkerClient) -> None:
        self._worker = worker
        self._random = random.Random(1)  # noqa: S311 -- the same run again, not a secret
        self._open: dict[str, CancelAt] = {}
        self._sent = 0
        self.tally = Tally()

    def run(self, requests: int) -> None:
        """Send so many more requests, and follow each of them to its end."""
        last = self._sent + requests
        while self._open or self._sent < last:
            while self._sent < last and len(self._open) < OPEN_REQUESTS:
                self._send_next()
            if self._open:
                self._handle(self._worker.receive())

    def snapshot(self) -> Snapshot:
        """The worker's snapshot of now."""
        self._worker.send(Ping())
        while not isinstance(message := self._worker.receive(), Pong):
            self._handle(message)
        return message.snapshot

    def _send_next(self) -> None:
        self._sent += 1
        name, cancel_at = f"{self._sent}", self._random.choice(CANCEL_AT)
        # So few frames that the credit suffices: this client grants no more.
        sampling = Sampling(seed=self._sent, max_new_tokens=self._random.randint(1, 6))
        text = self._random.choice(SENTENCES)
        client = f"client {self._sent % 5}"
        speak = Speak(
            id=name,
            client=client,
            model=MODEL,
            task="CustomVoice",
            segments=[Segment(text=text)],
            voice="ryan",
            sampling=sampling,
            credit=16,
        )
        self._worker.send(speak)
        self._open[name] = cancel_at
        if cancel_at == "at once":
            self._cancel(name)

    def _handle(self, message: Message) -> None:
        match message:
            case Failed():
                raise AssertionError(message)
            case Started(id=name) if self._open.get(name) == "Started":
                self._cancel(name)
            case Audio(id=name) if self._open.get(name) == "Audio":
                self._cancel(name)
            case Finished(id=name) if name in self._open:
                del self._open[name]
                self.tally.finished += 1

    def _cancel(self, name: str) -> None:
        del self._open[name]
        self._worker.send(Cancel(id=name))
        self.tally.cancelled += 1


@contextmanager
def qwen_worker(folder: Path) -> Iterator[tuple[LoadClient, int]]:
    """A worker process with a small Qwen3-TTS model: a client that is connected to it, and its process id."""
    settings = {
        "DEFAULT_MODEL": MODEL,
        "DEFAULT_DEVICE": "cpu",
        "MODEL_PATHS": f"{MODEL}={tiny('custom_voice').resolve()}",
        "MAX_CONCURRENCY": SLOTS,
        "LOG_LEVEL": "warning",
    }
    with running_worker(folder, **settings) as (url, worker), WorkerClient(url) as connected:
        client = LoadClient(connected)
        eventually(lambda: not client.snapshot().preloading, 60, "the model loaded")
        yield client, worker.pid


@pytest.mark.soak
@pytest.mark.parametrize(("warm_up", "each"), [pytest.param(100, 10, id="short"), pytest.param(1000, 750, id="long")])
def test_engine_keeps_nothing_of_its_requests(tmp_path: Path, warm_up: int, each: int) -> None:
    """Qwen3-TTS over ZeroMQ, half of the requests cancelled: memory grows by less than 1 %, all slots are free.

    Every request that was not cancelled finishes, and every request is counted as finished or as cancelled.
    """
    with qwen_worker(tmp_path) as (client, pid):
        client.run(warm_up)
        memory = []
        for _ in range(ROUNDS):
            client.run(each)
            memory.append(resident_bytes(pid))
        eventually(lambda: client.snapshot().running == 0, 60, "the last requests cancelled")
        snapshot, tally = client.snapshot(), client.tally
    counted = snapshot.requests
    assert (snapshot.queued, snapshot.slots) == (0, SLOTS)
    assert tally.finished + tally.cancelled == warm_up + ROUNDS * each
    assert counted.finished + counted.cancelled == tally.finished + tally.cancelled
    assert counted.finished >= tally.finished > 0
    assert 0 < counted.cancelled <= tally.cancelled
    assert (counted.failed, counted.rejected) == (0, 0)
    assert growth(memory) < 0.01, memory


@pytest.mark.parametrize(
    ("warm_up", "each", "most"),
    [pytest.param(60, 5, 0.05, id="short"), pytest.param(1000, 750, 0.01, id="long", marks=pytest.mark.soak)],
)
def test_clients_that_come_and_go_leave_nothing(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, warm_up: int, each: int, most: float
) -> None:
    """espeak-ng over HTTP in every format and form, clients disconnecting at any moment: no process grows.

    Every client that stays gets a whole 200; no request fails or is refused, and each that began has ended.
    """
    for name, value in EXACT_MALLOC.items():
        monkeypatch.setenv(name, value)
    service = start(LOG_LEVEL="warning")
    (web,), gpu = service.web_pids(), service.worker_pid()
    random_ = random.Random(1)  # noqa: S311 -- the same run again, not a secret
    tally = Tally()
    asyncio.run(visit(service, warm_up, random_, tally))
    # On a busy machine all others that leave may do so before their request has been read.
    with service.stream(" ".join(SENTENCES * 20), response_format="pcm") as answer:
        next(answer.iter_raw())
    tally.cancelled += 1
    memory: dict[int, list[int]] = {web: [], gpu: []}
    for _ in range(ROUNDS):
        asyncio.run(visit(service, each, random_, tally))
        eventually(lambda: idle(service), 60, "no requests")
        for pid, found in memory.items():
            found.append(resident_bytes(pid))
    # The figures may be a moment older than the last answer.
    eventually(lambda: tally.finished <= service.stats()["requests"]["finished"], 60, "every answer counted")
    counted = service.stats()["requests"]
    assert tally.finished + tally.cancelled == warm_up + ROUNDS * each + 1
    assert tally.finished <= counted["finished"]
    assert 0 < counted["cancelled"] <= counted["finished"] + counted["cancelled"] - tally.finished <= tally.cancelled
    assert (counted["failed"], counted["rejected"]) == (0, 0)
    assert (web, gpu) == (service.stats()["web_pid"], service.worker_pid())
    for found in memory.values():
        assert growth(found) < most, memory


async def visit(service: Service, requests: int, random_: random.Random, tally: Tally) -> None:
    """Send so many requests from sixteen clients, some of which disconnect before or during their answer."""
    numbers = iter(range(requests))

    async def client(http: httpx.AsyncClient) -> None:
        for _ in numbers:
            body = {
                "input": random_.choice(SENTENCES),
                "model": "espeak-ng",
                "response_format": random_.choice(FORMATS),
            }
            patience_s = random_.choice([None, None, random_.uniform(0, 0.1)])
            try:
                async with asyncio.timeout(patience_s):
                    answer = await http.post("/v1/audio/speech", json=body | random_.choice(FORMS))
            except TimeoutError:
                tally.cancelled += 1
                continue
            assert answer.status_code == httpx.codes.OK, answer.text
            assert answer.content
            tally.finished += 1

    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:
        await asyncio.gather(*(client(http) for _ in range(16)))


def idle(service: Service) -> bool:
    """True if no request is running or queued."""
    stats = service.stats()
    return bool(stats["running"] == stats["queued"] == 0)


def growth(memory: Sequence[int]) -> float:
    """The relative growth from the median of the first third to that of the last; single readings vary too much."""
    third = len(memory) // 3
    return statistics.median(memory[-third:]) / statistics.median(memory[:third]) - 1
