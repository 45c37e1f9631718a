"""A residency over fakes: a device that counts, threads that answer at once, an engine that holds bytes."""

import threading
from collections.abc import Collection
from typing import Any

import msgspec

from gpu_worker.engines.base import EngineStats, Event, Job, JobError, Memory
from gpu_worker.residency import (
    Downloaded,
    FilesChecked,
    Refusal,
    Residency,
    ResidencyOptions,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.residency.models import TARGET_STATE, CheckFiles, Download, ModelState, Transition
from shared.protocol import CacheName, ModelStatus
from tests.gpu_worker.fakes import WALL, FakeClock, FakeDevice, a_spec


class FakeEngine:
    """An engine that holds `n_bytes` of a FakeDevice and fails where it is told to.

    `troubles` maps a method's name to what it raises. It notes its calls and the thread they came from.
    """

    def __init__(self, model: str, device: FakeDevice, n_bytes: int) -> None:
        self._model = model
        self._device = device
        self._n_bytes = n_bytes
        self._memory = device.put(model, ModelState.RESIDENT, n_bytes)
        self.troubles: dict[str, Exception] = {}
        self.calls: list[str] = []
        self.threads: set[str] = set()

    def warm_up(self) -> None:
        """Never asked: that is the synthesis loop's part."""
        raise AssertionError

    def capacity(self) -> int:
        """No room for jobs: these tests run none."""
        return 0

    def admit(self, job: Job) -> None:
        """Never asked."""
        raise AssertionError(job)

    def is_faster_alone(self) -> bool:
        """Never asked."""
        raise AssertionError

    def runnable(self, stalled: Collection[str]) -> bool:
        """Nothing to do."""
        return bool(stalled) and False

    def step(self, stalled: Collection[str]) -> list[Event]:
        """Never asked."""
        raise AssertionError(stalled)

    def park(self, job_id: str) -> int:
        """Never asked."""
        raise AssertionError(job_id)

    def park_bytes(self, job_id: str) -> int:
        """Never asked."""
        raise AssertionError(job_id)

    def unpark(self, job_id: str) -> None:
        """Never asked."""
        raise AssertionError(job_id)

    def cancel(self, job_id: str) -> None:
        """Never asked."""
        raise AssertionError(job_id)

    def offload(self) -> None:
        """Move the bytes to the host."""
        self._call("offload", ModelState.OFFLOADED)

    def restore(self) -> None:
        """Move them back."""
        self._call("restore", ModelState.RESIDENT)

    def close(self) -> None:
        """Give them up."""
        self._call("close", ModelState.ABSENT)

    def memory(self) -> Memory:
        """The memory that it holds."""
        return self._memory

    def stats(self) -> EngineStats:
        """Nothing: it does no work."""
        return EngineStats()

    def empty_cache(self, name: CacheName) -> None:
        """Nothing: it has none."""
        del name

    def _call(self, name: str, state: ModelState) -> None:
        self.calls.append(name)
        self.threads.add(threading.current_thread().name)
        if name in self.troubles:
            raise self.troubles[name]
        self._memory = self._device.put(self._model, state, self._n_bytes)


def done(transition: Transition, memory: Memory, engine: FakeEngine | None = None) -> TransitionDone:
    """The report of a transition that worked; fields that Residency does not read are left empty."""
    return TransitionDone(
        transition=transition, engine=engine, memory=memory, before_bytes=0, after_bytes=0, seconds=0.0
    )


def failed(
    transition: Transition, state: ModelState, code: str = "model_unavailable", message: str = "it broke"
) -> TransitionFailed:
    """The report of a transition that did not work."""
    return TransitionFailed(transition=transition, error=JobError(code, message), state=state)


class Bench:
    """A Residency whose file checks are answered at once, and whose transitions end when the test says so.

    `problems`: what is missing of a model's files; models in `remote` need a download, those in `downloading` are
    being downloaded. `found`: the last check of each model; `checks` counts them.
    `transitions`: (kind, model) of those that worked.
    """

    def __init__(self, sizes: dict[str, int], device: FakeDevice | None = None, **options: Any) -> None:
        self.sizes = dict(sizes)
        self.device = device or FakeDevice()
        self.clock = FakeClock()
        self.transitions: list[tuple[str, str]] = []
        self.problems: dict[str, str] = {}
        self.remote: set[str] = set()
        self.stamps: dict[str, str] = {}
        self.found: dict[str, FilesChecked] = {}
        self.checks = 0
        self.downloading: list[str] = []
        self._started: list[Transition] = []
        self.residency = Residency(
            [a_spec(model, size) for model, size in sizes.items()],
            ResidencyOptions(**options),
            probe=self.device,
            move=self._started.append,
            see_to_files=self._see_to_files,
            clock=self.clock,
            wall=lambda: WALL + self.clock.now,
        )

    def downloaded(self, model: str, error: JobError | None = None) -> Refusal | None:
        """A download has ended."""
        self.downloading.remove(model)
        if error is None:
            self.remote.discard(model)
            self.found[model] = msgspec.structs.replace(self.found[model], remote=False)
        return self.residency.handle(Downloaded(model=model, error=error))

    def advance(self) -> list[Transition | Refusal]:
        """One decision: refusals, then the transition that was started."""
        refusals = self.residency.advance()
        started = list(self._started)
        self._started.clear()
        return [*refusals, *started]

    def finish(self, transition: Transition) -> None:
        """The transition works."""
        self.transitions.append((transition.kind, transition.model))
        model, state = transition.model, TARGET_STATE[transition.kind]
        n_bytes = self.sizes[model]
        engine = FakeEngine(model, self.device, n_bytes) if state is ModelState.RESIDENT else None
        memory = self.device.put(model, state, n_bytes)
        assert self.residency.handle(done(transition, memory, engine)) is None

    def fail_next(
        self, state: ModelState, code: str = "model_unavailable", message: str = "it broke"
    ) -> Refusal | None:
        """The next transition does not work; the model is in `state` then."""
        error = JobError(code, message)
        return self.residency.handle(TransitionFailed(transition=self.next_transition(), error=error, state=state))

    def settle(self) -> list[Refusal]:
        """Carry out all there is to do; returns the refusals of the end, whose requests are still there."""
        for _ in range(50):
            decisions = self.advance()
            transitions = [decision for decision in decisions if isinstance(decision, Transition)]
            if not transitions:
                return [decision for decision in decisions if isinstance(decision, Refusal)]
            self.finish(transitions[0])
        raise AssertionError(f"it does not come to rest: {self.transitions[-6:]}")

    def next_transition(self) -> Transition:
        """The one transition to start now."""
        (transition,) = self.advance()
        assert isinstance(transition, Transition)
        return transition

    def use(self, *models: str, keep_alive_s: float | None = None) -> None:
        """A request of each model in turn, a second each, from its arrival to its end."""
        for model in models:
            self.residency.acquire(model)
            assert self.settle() == []
            self.clock.advance(1)
            self.residency.release(model, keep_alive_s)

    def states(self) -> dict[str, str]:
        """Where each model is, as clients see it."""
        return {status.id: status.state for status in self.residency.statuses()}

    def model(self, model: str) -> ModelStatus:
        """The status of one model."""
        return self.residency.status(model)

    def _see_to_files(self, work: CheckFiles | Download) -> None:
        model = work.model
        if isinstance(work, Download):
            self.downloading.append(model)
            return
        self.checks += 1
        self.found[model] = FilesChecked(
            model=model,
            problem=self.problems.get(model, ""),
            remote=model in self.remote,
            stamp=self.stamps.get(model, "unchanged"),
        )
        self.residency.handle(self.found[model])
