"""Stand-ins for what moves and measures models: a clock, a device that keeps count, an engine that only holds bytes."""

import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from gpu_worker.engines.base import Event, Job, JobError, Memory
from gpu_worker.residency.arrivals import Refusal
from gpu_worker.residency.cleanup import CleanupOptions
from gpu_worker.residency.manager import Residency
from gpu_worker.residency.moves import (
    ARRIVES,
    CheckFiles,
    Download,
    Downloaded,
    FilesChecked,
    Place,
    Transition,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.voices import VoiceFiles, VoiceRecord
from shared.catalog import ModelSpec
from shared.protocol import DeviceMemory, HostMemory, ModelStatus

WALL = 1_700_000_000.0
"""What the wall clock shows when a FakeClock shows 0."""


def a_spec(model: str, estimated_bytes: int = 100) -> ModelSpec:
    """A model that takes `estimated_bytes`, as far as the catalogue knows."""
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


class FakeClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Now."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class FakeDevice:
    """A device and a host that hold what is put there, and say so: the truth that decisions are compared with.

    It is the MemoryProbe too. On a CPU the two memories are one.
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
        self.collected = 0
        self.reclaimed = 0

    def device(self) -> DeviceMemory:
        """What is on the device."""
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
        """What is in host RAM."""
        ours = sum(self.on_host.values())
        return HostMemory(
            total_bytes=self.host_total_bytes,
            free_bytes=self.host_total_bytes - ours,
            ours_bytes=ours,
            offloaded_bytes=0,
            budget_bytes=self.host_budget_bytes,
        )

    def reclaim(self, *, collect: bool) -> None:
        """Count the calls."""
        self.reclaimed += 1
        self.collected += collect

    def place(self, model: str, place: Place, n_bytes: int) -> Memory:
        """Put a model of `n_bytes` into `place`, and say what it holds there."""
        self.on_device.pop(model, None)
        self.on_host.pop(model, None)
        if place == "resident":
            self.on_device[model] = n_bytes
            return Memory(device={"weights": n_bytes})
        if place == "offloaded":
            self.on_host[model] = n_bytes
            return Memory(host={"weights": n_bytes})
        return Memory()


class FakeEngine:
    """An engine that holds `n_bytes` of a FakeDevice and fails where it is told to.

    `troubles` maps a method's name to what it raises. It notes its calls and the thread they came from.
    """

    def __init__(self, model: str, device: FakeDevice, n_bytes: int) -> None:
        self._model = model
        self._device = device
        self._n_bytes = n_bytes
        self._memory = device.place(model, "resident", n_bytes)
        self.troubles: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.threads: set[str] = set()

    def capacity(self) -> int:
        """No room for jobs: these tests run none."""
        return 0

    def admit(self, job: Job) -> None:
        """Never asked."""
        raise AssertionError(job)

    def runnable(self, stalled: Collection[str]) -> bool:
        """Nothing to do."""
        return bool(stalled) and False

    def step(self, stalled: Collection[str]) -> list[Event]:
        """Never asked."""
        raise AssertionError(stalled)

    def cancel(self, job_id: str) -> None:
        """Never asked."""
        raise AssertionError(job_id)

    def offload(self) -> None:
        """Move the bytes to the host."""
        self._call("offload", "offloaded")

    def restore(self) -> None:
        """Move them back."""
        self._call("restore", "resident")

    def close(self) -> None:
        """Give them up."""
        self._call("close", "absent")

    def memory(self) -> Memory:
        """What it holds."""
        return self._memory

    def _call(self, name: str, place: Place) -> None:
        self.calls.append(name)
        self.threads.add(threading.current_thread().name)
        if name in self.troubles:
            raise self.troubles[name]
        self._memory = self._device.place(self._model, place, self._n_bytes)


def done(move: Transition, memory: Memory) -> TransitionDone:
    """The report of a move that worked; what residency does not look at is left plain."""
    return TransitionDone(move=move, engine=None, memory=memory, before_bytes=0, after_bytes=0, seconds=0.0)


def failed(
    move: Transition, left: Place, code: str = "model_unavailable", message: str = "it broke"
) -> TransitionFailed:
    """The report of a move that did not."""
    return TransitionFailed(move=move, error=JobError(code, message), left=left)


class FakeFiles:
    """The files of models: whole and here, but for those that are told otherwise.

    `problems` are what is missing; a model in `remote` has to be fetched, which `gate`, cleared, holds up
    and `fetch_troubles` prevent, one after the other. `stamps` change what a model's files look like.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self.remote: set[str] = set()
        self.stamps: dict[str, str] = {}
        self.fetch_troubles: dict[str, list[Exception]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.threads: dict[str, set[str]] = {}

    def problem_of(self, spec: ModelSpec) -> str | None:
        """What is missing."""
        self._note("problem_of")
        return self.problems.get(spec.id)

    def needs_fetch(self, spec: ModelSpec) -> bool:
        """Whether it is elsewhere."""
        return spec.id in self.remote

    def stamp_of(self, spec: ModelSpec) -> str:
        """What its files look like."""
        return self.stamps.get(spec.id, "as ever")

    def fetch(self, spec: ModelSpec) -> None:
        """Bring it here."""
        self._note("fetch")
        assert self.gate.wait(10)
        if troubles := self.fetch_troubles.get(spec.id):
            raise troubles.pop(0)
        self.remote.discard(spec.id)

    def _note(self, call: str) -> None:
        self.threads.setdefault(call, set()).add(threading.current_thread().name)


class SlowVoiceFiles(VoiceFiles):
    """Voices on the real disk, which takes its time: `gate`, cleared, holds up whoever writes.

    `troubles` are raised by the next writes, one after the other. It notes the threads that wrote.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.gate = threading.Event()
        self.gate.set()
        self.troubles: list[Exception] = []
        self.threads: set[str] = set()

    def save(self, record: VoiceRecord, pcm: bytes) -> None:
        """Write, in time."""
        self._wait()
        super().save(record, pcm)

    def delete(self, record: VoiceRecord) -> None:
        """Take away, in time."""
        self._wait()
        super().delete(record)

    def _wait(self) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(10)
        if self.troubles:
            raise self.troubles.pop(0)


Report = TypeVar("Report")


class Reports(Generic[Report]):
    """Where a thread's reports go; `wait` gives the next."""

    def __init__(self) -> None:
        self._arrived = threading.Semaphore(0)
        self._reports: list[Report] = []

    def __call__(self, report: Report) -> None:
        """Take the next report."""
        self._reports.append(report)
        self._arrived.release()

    def wait(self, timeout_s: float = 10.0) -> Report:
        """The oldest report not yet taken; AssertionError where none comes in time."""
        assert self._arrived.acquire(timeout=timeout_s), "no report came"
        return self._reports.pop(0)


class Bench:
    """A residency over a fake device, a fetcher that looks at once, and a loader that carries moves out at once.

    `problems` are what is missing for a model, `found` is what was seen of its files the last time;
    the models in `remote` have to be fetched first, and those in `fetching` are under way.
    """

    def __init__(self, sizes: dict[str, int], device: FakeDevice | None = None, **options: Any) -> None:
        self.sizes = dict(sizes)
        self.device = device or FakeDevice()
        self.clock = FakeClock()
        self.residency = Residency(
            [a_spec(model, size) for model, size in sizes.items()],
            CleanupOptions(**options),
            self.clock,
            self.device,
            wall=lambda: WALL + self.clock.now,
        )
        self.moves: list[tuple[str, str]] = []
        self.problems: dict[str, str] = {}
        self.remote: set[str] = set()
        self.stamps: dict[str, str] = {}
        self.found: dict[str, FilesChecked] = {}
        self.looks = 0
        self.fetching: list[str] = []

    def see_to_files(self) -> None:
        """Do the errands: the looks have ended, and the fetches have begun."""
        while errands := self.residency.errands.due():
            for errand in errands:
                match errand:
                    case CheckFiles(model):
                        self.looks += 1
                        self.found[model] = self._seen(model)
                        self.residency.errands.looked(self.found[model])
                    case Download(model):
                        self.fetching.append(model)

    def fetched(self, model: str, error: JobError | None = None) -> Refusal | None:
        """A fetch has ended."""
        self.fetching.remove(model)
        if error is None:
            self.remote.discard(model)
            self.found[model] = msgspec.structs.replace(self.found[model], remote=False)
        return self.residency.fetched(Downloaded(model=model, error=error))

    def plan(self) -> list[Transition | Refusal]:
        """What to do now, as far as files are concerned."""
        self.see_to_files()
        return self.residency.plan()

    def finish(self, move: Transition) -> None:
        """The move works."""
        self.moves.append((move.kind, move.model))
        memory = self.device.place(move.model, ARRIVES[move.kind], self.sizes[move.model])
        self.residency.moved(done(move, memory))

    def settle(self) -> list[Refusal]:
        """Carry out all there is to do; the refusals that came of it, whose requests are still there."""
        for _ in range(50):
            decisions = self.plan()
            moves = [decision for decision in decisions if isinstance(decision, Transition)]
            if not moves:
                return [decision for decision in decisions if isinstance(decision, Refusal)]
            self.finish(moves[0])
        raise AssertionError(f"it does not come to rest: {self.moves[-6:]}")

    def next_move(self) -> Transition:
        """The one move to start now."""
        (move,) = self.plan()
        assert isinstance(move, Transition)
        return move

    def use(self, *models: str, keep_alive_s: float | None = None) -> None:
        """A request of each model in turn, a second each, from its arrival to its end."""
        for model in models:
            self.residency.acquire(model)
            assert self.settle() == []
            self.clock.advance(1)
            self.residency.release(model, keep_alive_s)

    def states(self) -> dict[str, str]:
        """Where each model is."""
        return {model.id: model.state for model in self.residency.models()}

    def model(self, model: str) -> ModelStatus:
        """What is told of one model."""
        return next(state for state in self.residency.models() if state.id == model)

    def _seen(self, model: str) -> FilesChecked:
        return FilesChecked(
            model=model,
            problem=self.problems.get(model, ""),
            remote=model in self.remote,
            stamp=self.stamps.get(model, "as ever"),
        )
