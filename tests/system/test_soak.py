"""Many requests, many of them given up halfway: memory stays flat, every slot comes back, every request is counted.

The long runs are marked `soak`; short ones of the same make hold in every run of the suite.
"""

import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

import httpx
import msgspec
import pytest
import zmq

from shared.protocol import (
    VERSION,
    Audio,
    Cancel,
    Failed,
    Finished,
    Hello,
    Message,
    Ping,
    Pong,
    Sampling,
    Snapshot,
    Speak,
    Started,
    Welcome,
    decode_from_worker,
    encode,
)
from shared.sockets import connect_dealer
from tests.checkpoints import tiny
from tests.recogniser import SENTENCES
from tests.system.service import ROOT, Service, eventually, resident_bytes

MODEL: Final = "qwen3-tts-0.6b-customvoice"
SLOTS: Final = 8
COMPANY: Final = 24
"""Requests under way at once: three times what the slots hold, so the queue is in use as well."""

Leave = Literal["never", "at once", "when it starts", "when it speaks"]
LEAVES: Final[Sequence[Leave]] = ("never", "never", "never", "at once", "when it starts", "when it speaks")
"""What becomes of a request, drawn for each."""

FORMATS: Final = ("mp3", "opus", "aac", "flac", "wav", "pcm")
FORMS: Final[Sequence[dict[str, object]]] = ({}, {"stream": False}, {"stream_format": "sse"})
ROUNDS: Final = 12
"""Readings of the memory, so many requests apart as a test says."""

RETURN_MEMORY: Final = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""What is freed goes back to the kernel at once.

Left alone, glibc keeps tens of megabytes for the next FLAC encoder, and what a process uses cannot be read off it.
"""

SILENCE_S: Final = 20.0
"""Without a word from the worker for so long, something hangs."""


class Tally(msgspec.Struct):
    """What became of the requests, as seen from here."""

    heard: int = 0
    left: int = 0


class Company:
    """A web worker's end of the conversation that keeps many requests under way and gives some of them up."""

    def __init__(self, url: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer = connect_dealer(self._context, url)
        self._random = random.Random(1)  # noqa: S311 -- the same run again, not a secret
        self._open: dict[str, Leave] = {}
        self._asked = 0
        self.tally = Tally()

    def meet(self) -> Snapshot:
        """Say hello as soon as the worker is there, and wait until its model is resident."""
        assert self._dealer.poll(30_000, zmq.POLLOUT), "no worker"
        self._send(Hello(version=VERSION, token=""))
        assert isinstance(self._receive(), Welcome)
        eventually(lambda: not self.snapshot().preloading, 60, "the model loaded")
        return self.snapshot()

    def close(self) -> None:
        """Hang up."""
        self._dealer.close()
        self._context.term()

    def talk(self, requests: int) -> None:
        """Ask for so many more, and see each of them through."""
        last = self._asked + requests
        while self._open or self._asked < last:
            while self._asked < last and len(self._open) < COMPANY:
                self._ask()
            if self._open:
                self._hear(self._receive())

    def snapshot(self) -> Snapshot:
        """What the worker says of itself now."""
        self._send(Ping())
        while not isinstance(message := self._receive(), Pong):
            self._hear(message)
        return message.snapshot

    def _ask(self) -> None:
        self._asked += 1
        name, leave = f"{self._asked}", self._random.choice(LEAVES)
        # So few frames that the credit never runs out: nobody grants more here.
        sampling = Sampling(seed=self._asked, max_new_tokens=self._random.randint(1, 6))
        text = self._random.choice(SENTENCES)
        client = f"client {self._asked % 5}"
        speak = Speak(
            id=name,
            client=client,
            model=MODEL,
            task="CustomVoice",
            text=text,
            voice="ryan",
            sampling=sampling,
            credit=16,
        )
        self._send(speak)
        self._open[name] = leave
        if leave == "at once":
            self._leave(name)

    def _hear(self, message: Message) -> None:
        match message:
            case Failed():
                raise AssertionError(message)
            case Started(id=name) if self._open.get(name) == "when it starts":
                self._leave(name)
            case Audio(id=name) if self._open.get(name) == "when it speaks":
                self._leave(name)
            case Finished(id=name) if name in self._open:
                del self._open[name]
                self.tally.heard += 1

    def _leave(self, name: str) -> None:
        del self._open[name]
        self._send(Cancel(id=name))
        self.tally.left += 1

    def _send(self, message: Message) -> None:
        self._dealer.send_multipart(encode(message))

    def _receive(self) -> Message:
        assert self._dealer.poll(SILENCE_S * 1000), f"the worker said nothing for {SILENCE_S} s"
        message: Message = decode_from_worker(self._dealer.recv_multipart())[0]
        return message


@contextmanager
def small_engine(folder: Path) -> Iterator[tuple[Company, int]]:
    """A worker process with a small Qwen3-TTS model, met; and its process id."""
    with tempfile.TemporaryDirectory() as private:  # ipc paths are short
        url = f"ipc://{private}/w.ipc"
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TTS_")}
        environ |= {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TTS_WORKER_URL": url,
            "TTS_DEFAULT_MODEL": MODEL,
            "TTS_DEFAULT_DEVICE": "cpu",
            "TTS_MODEL_PATHS": f"{MODEL}={tiny('custom_voice').resolve()}",
            "TTS_MAX_CONCURRENCY": str(SLOTS),
            "TTS_VOICES_DIR": str(folder / "voices"),
            "TTS_LOG_LEVEL": "warning",
        }
        worker = subprocess.Popen([sys.executable, "-m", "gpu_worker"], env=environ, cwd=folder)
        company = Company(url)
        try:
            company.meet()
            yield company, worker.pid
            worker.terminate()
            assert worker.wait(30) == 0
        finally:
            company.close()
            worker.kill()
            worker.wait()


@pytest.mark.parametrize(
    ("warm_up", "each"),
    [pytest.param(100, 20, id="short"), pytest.param(1000, 750, id="long", marks=pytest.mark.soak)],
)
def test_engine_keeps_nothing_of_its_requests(tmp_path: Path, warm_up: int, each: int) -> None:
    """Qwen3-TTS over ZeroMQ, in company, half of it given up: memory grows by less than 1 %, all slots are free.

    Whoever was not given up was heard to the end, and every request was counted as finished or as cancelled.
    """
    with small_engine(tmp_path) as (company, pid):
        company.talk(warm_up)
        memory = []
        for _ in range(ROUNDS):
            company.talk(each)
            memory.append(resident_bytes(pid))
        eventually(lambda: company.snapshot().running == 0, 5, "the last ones cancelled")
        snapshot, tally = company.snapshot(), company.tally
    counted = snapshot.requests
    assert (snapshot.queued, snapshot.slots) == (0, SLOTS)
    assert tally.heard + tally.left == warm_up + ROUNDS * each
    assert counted.finished + counted.cancelled == tally.heard + tally.left
    assert counted.finished >= tally.heard > 0
    assert 0 < counted.cancelled <= tally.left
    assert (counted.failed, counted.rejected) == (0, 0)
    assert growth(memory) < 0.01, memory


@pytest.mark.parametrize(
    ("warm_up", "each", "most"),
    [pytest.param(150, 15, 0.05, id="short"), pytest.param(1000, 750, 0.01, id="long", marks=pytest.mark.soak)],
)
def test_clients_that_come_and_go_leave_nothing(
    start: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, warm_up: int, each: int, most: float
) -> None:
    """espeak-ng over HTTP in every format and form, clients leaving at any moment: both processes stay as they are.

    Whoever stayed got a 200 to its end; nothing failed, nothing was refused, and what began was ended.
    """
    for name, value in RETURN_MEMORY.items():
        monkeypatch.setenv(name, value)
    service = start(LOG_LEVEL="warning")
    (web,), gpu = service.web_pids(), service.worker_pid()
    random_ = random.Random(1)  # noqa: S311 -- the same run again, not a secret
    tally = Tally()
    asyncio.run(visit(service, warm_up, random_, tally))
    memory: dict[int, list[int]] = {web: [], gpu: []}
    for _ in range(ROUNDS):
        asyncio.run(visit(service, each, random_, tally))
        eventually(lambda: idle(service), 5, "the departed forgotten")
        for pid, found in memory.items():
            found.append(resident_bytes(pid))
    counted = service.stats()["requests"]
    assert tally.heard + tally.left == warm_up + ROUNDS * each
    assert tally.heard <= counted["finished"]
    # A client may leave before anybody has read what it wants.
    assert 0 < counted["cancelled"] <= counted["finished"] + counted["cancelled"] - tally.heard <= tally.left
    assert (counted["failed"], counted["rejected"]) == (0, 0)
    assert (web, gpu) == (service.stats()["web_pid"], service.worker_pid())
    for found in memory.values():
        assert growth(found) < most, memory


async def visit(service: Service, requests: int, random_: random.Random, tally: Tally) -> None:
    """So many requests by sixteen clients, some of whom leave: before their answer begins, or in the middle of it."""
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
                tally.left += 1
                continue
            assert answer.status_code == httpx.codes.OK, answer.text
            assert answer.content
            tally.heard += 1

    async with httpx.AsyncClient(base_url=service.url, timeout=60, trust_env=False) as http:
        await asyncio.gather(*(client(http) for _ in range(16)))


def idle(service: Service) -> bool:
    """Whether the worker has no requests."""
    stats = service.stats()
    return bool(stats["running"] == stats["queued"] == 0)


def growth(memory: Sequence[int]) -> float:
    """By what part of the first third's median the last third's is larger: a single reading says little."""
    third = len(memory) // 3
    return statistics.median(memory[-third:]) / statistics.median(memory[:third]) - 1
