"""Stand-ins for the parts of the worker: a clock, a device that counts bytes, files of models and of voices."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from gpu_worker.engines.base import Job, Memory
from gpu_worker.requests import Request, Send, Sink
from gpu_worker.requests.audio_buffer import AudioBuffer
from gpu_worker.residency.models import ModelState
from gpu_worker.voices import VoiceFiles
from gpu_worker.voices.records import Record
from shared.catalog import ModelSpec
from shared.protocol import DeviceMemory, HostMemory, Segment

WALL = 1_700_000_000.0
"""Unix seconds at which a FakeClock shows 0."""


def a_spec(model: str, estimated_bytes: int = 100) -> ModelSpec:
    """A model of the catalogue with that estimate of its size."""
    return ModelSpec(
        id=model,
        name=model,
        engine="qwen",
        task="Base",
        owned_by="nobody",
        created=0,
        languages=[],
        estimated_bytes=estimated_bytes,
    )


def a_sink(request_id: str = "r", *, credit: int = 1_000, send: Send = lambda _message, _payload: None) -> Sink:
    """A sink with a buffer of its own."""
    return Sink(request_id, send, credit, AudioBuffer(2**24))


def a_recorded_sink(credit: int) -> tuple[Sink, list[tuple[Any, bytes | None]]]:
    """A sink with a buffer of its own, and the list of what it sends."""
    sent: list[tuple[Any, bytes | None]] = []
    return a_sink(credit=credit, send=lambda message, payload: sent.append((message, payload))), sent


def a_request(
    request_id: str = "r",
    *,
    client: str = "alice",
    model: str = "m",
    sink: Sink | None = None,
    arrived_at: float = 0.0,
    is_batch: bool = False,
) -> Request:
    """A queued request."""
    return Request(
        peer=b"web",
        id=request_id,
        client=client,
        model=model,
        job=Job(id=request_id, task="Base", segments=[Segment(text="a secret")]),
        sink=sink or a_sink(request_id),
        keep_alive_s=None,
        arrived_at=arrived_at,
        is_batch=is_batch,
    )


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """The time."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class FakeDevice:
    """A device and a host that count the bytes that models put there. It is the MemoryProbe, too.

    On a CPU the two memories are one.
    """

    def __init__(
        self,
        *,
        kind: Literal["cuda", "cpu"] = "cuda",
        total_bytes: int = 1_000_000,
        budget_bytes: int = 1_000_000,
        host_total_bytes: int = 1_000_000,
        host_budget_bytes: int = 1_000_000,
    ) -> None:
        self.kind: Literal["cuda", "cpu"] = kind
        self.total_bytes = total_bytes
        self.budget_bytes = budget_bytes
        self.host_total_bytes = host_total_bytes
        self.host_budget_bytes = host_budget_bytes
        self.others_bytes = 0
        self.on_device: dict[str, int] = {}
        self.on_host: dict[str, int] = {}
        self.readings = 0
        self.collected = 0
        self.reclaimed = 0
        self.is_moving = False

    def device(self) -> DeviceMemory:
        """The device's memory."""
        self.readings += 1
        ours = sum(self.on_device.values()) + (sum(self.on_host.values()) if self.kind == "cpu" else 0)
        used = ours + self.others_bytes
        return DeviceMemory(
            name="a fake",
            kind=self.kind,
            total_bytes=self.total_bytes,
            used_bytes=used,
            free_bytes=self.total_bytes - used,
            ours_bytes=ours,
            others_bytes=self.others_bytes,
            budget_bytes=self.budget_bytes,
        )

    def host(self) -> HostMemory:
        """The host's memory."""
        ours = sum(self.on_host.values())
        return HostMemory(
            total_bytes=self.host_total_bytes,
            free_bytes=self.host_total_bytes - ours,
            ours_bytes=ours,
            offloaded_bytes=0,
            budget_bytes=self.host_budget_bytes,
        )

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """The mover moves a model; `is_moving` says so."""
        self.is_moving = True
        yield
        self.is_moving = False

    def reclaim(self, *, collect: bool) -> None:
        """Count the calls."""
        self.reclaimed += 1
        self.collected += collect

    def put(self, model: str, state: ModelState, n_bytes: int) -> Memory:
        """Hold a model of `n_bytes` where `state` says, and nowhere else; returns what it holds."""
        self.on_device.pop(model, None)
        self.on_host.pop(model, None)
        if state is ModelState.RESIDENT:
            self.on_device[model] = n_bytes
            return Memory(device={"weights": n_bytes})
        if state is ModelState.OFFLOADED:
            self.on_host[model] = n_bytes
            return Memory(host={"weights": n_bytes})
        return Memory()


class FakeFiles:
    """The files of models, in place of an EngineFactory; whole and local unless a test says otherwise.

    `problems` are the answers of `problem_of`. A model in `remote` has to be downloaded, which waits while `gate` is
    cleared; the next downloads raise the `download_errors` of the model, one each.
    `stamps` are the stamps of changed files. `threads` are the names of the threads of each method.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.remote: set[str] = set()
        self.stamps: dict[str, str] = {}
        self.download_errors: dict[str, list[Exception]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.threads: dict[str, set[str]] = {}

    def problem_of(self, spec: ModelSpec) -> str | None:
        """The missing part of the model's files; None if none is."""
        self._record_thread("problem_of")
        return self.problems.get(spec.id)

    def needs_download(self, spec: ModelSpec) -> bool:
        """Whether the model is in `remote`."""
        return spec.id in self.remote

    def file_stamp(self, spec: ModelSpec) -> str:
        """The model's stamp."""
        return self.stamps.get(spec.id, "unchanged")

    def download(self, spec: ModelSpec) -> None:
        """Take the model out of `remote`."""
        self._record_thread("download")
        assert self.gate.wait(10)
        if errors := self.download_errors.get(spec.id):
            raise errors.pop(0)
        self.remote.discard(spec.id)

    def _record_thread(self, call: str) -> None:
        self.threads.setdefault(call, set()).add(threading.current_thread().name)


class SlowVoiceFiles(VoiceFiles):
    """Voices on the real disk. While `gate` is cleared, writes wait.

    The next writes raise the `errors`, one each. `threads` are the names of the threads that wrote.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []
        self.threads: set[str] = set()

    def save(self, record: Record, pcm: bytes) -> None:
        """Wait, then write."""
        self._wait()
        super().save(record, pcm)

    def update(self, record: Record) -> None:
        """Wait, then update."""
        self._wait()
        super().update(record)

    def delete(self, record: Record) -> None:
        """Wait, then delete."""
        self._wait()
        super().delete(record)

    def _wait(self) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if self.errors:
            raise self.errors.pop(0)


Report = TypeVar("Report")


class Reports(Generic[Report]):
    """Collects the reports of a thread; `wait` returns the next."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        """Add a report."""
        self._reports.append(report)
        self._arrived.release()

    def wait(self, timeout_s: float = 10.0) -> Report:
        """Take the oldest report; AssertionError if none comes in time."""
        assert self._arrived.acquire(timeout=timeout_s), "no report came"
        return self._reports.pop(0)
