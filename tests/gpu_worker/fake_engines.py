"""A worker that is run turn by turn: real parts, but for engines that speak words and a clock that waits."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec

from gpu_worker.engines.base import Done, Event, Fault, Job, JobError, Memory, Pcm, Usage
from gpu_worker.requests import Request
from gpu_worker.residency import (
    Checkpoints,
    Downloaded,
    FilesChecked,
    Mover,
    Residency,
    ResidencyOptions,
    TransitionDone,
    TransitionFailed,
)
from gpu_worker.residency.models import CheckFiles, Download, ModelState, Transition
from gpu_worker.scheduler import Scheduler
from gpu_worker.serial_thread import SerialThread
from gpu_worker.stats import Stats
from gpu_worker.transport import Incoming
from gpu_worker.voices import VoiceStore, VoiceWrite
from gpu_worker.worker import Worker
from shared.catalog import ModelSpec
from shared.protocol import (
    Action,
    Audio,
    Call,
    Cancel,
    CloneVoice,
    Credit,
    Message,
    Ping,
    Pong,
    SavedVoice,
    Snapshot,
    Speak,
)
from tests.gpu_worker.fakes import WALL, FakeClock, FakeDevice, FakeFiles, SlowVoiceFiles, a_spec

WEB = b"web-1"
"""The web worker that speaks where a test does not say which."""

VOICE = b"\3\7" * 24_000
"""A recording that a voice can be cloned from."""

FAULT = "fault"
"""A word at which a job fails alone."""


def pcm_of(word: str) -> bytes:
    """What a SpeakingEngine says for a word."""
    return word.encode().ljust(8, b"\0")


class SpeakingEngine:
    """Says one word of every job's text in every step, in a slot for each.

    `admit_troubles` and `step_troubles` are raised one after the other, None meaning none this time.
    A step takes `step_s` on `clock`. `admitted` are the jobs that got a slot, in order.
    """

    def __init__(self, model: str, device: FakeDevice, clock: FakeClock, *, slots: int, n_bytes: int) -> None:
        self._model = model
        self._device = device
        self._clock = clock
        self._slots = slots
        self.n_bytes = n_bytes
        self.state = ModelState.RESIDENT
        self._memory = device.put(model, ModelState.RESIDENT, n_bytes)
        self._words: dict[str, deque[str]] = {}
        self.admit_troubles: deque[Exception | None] = deque()
        self.step_troubles: deque[Exception | None] = deque()
        self.step_s = 0.0
        self.steps = 0
        self.admitted: list[Job] = []

    @property
    def jobs(self) -> set[str]:
        """The texts that are being spoken."""
        return {job.text for job in self.admitted if job.id in self._words}

    def capacity(self) -> int:
        """Slots that are free."""
        return self._slots - len(self._words)

    def admit(self, job: Job) -> None:
        """Take a job; one more than there are slots is a defect of who asks."""
        assert self.state is ModelState.RESIDENT
        assert self.capacity() > 0
        assert job.id not in self._words
        _raise_next(self.admit_troubles)
        self.admitted.append(job)
        self._words[job.id] = deque(job.text.split())

    def runnable(self, stalled: Collection[str]) -> bool:
        """Whether any job may go on."""
        return any(job_id not in stalled for job_id in self._words)

    def step(self, stalled: Collection[str]) -> list[Event]:
        """One word of every job that may go on."""
        assert self.state is ModelState.RESIDENT
        self.steps += 1
        _raise_next(self.step_troubles)
        self._clock.advance(self.step_s)
        events: list[Event] = []
        for job_id, words in list(self._words.items()):
            if job_id in stalled:
                continue
            word = words.popleft()
            if word == FAULT:
                self.cancel(job_id)
                events.append(Fault(job_id, JobError("invalid_audio", "this one cannot be said", param="ref_audio")))
                continue
            job = next(job for job in self.admitted if job.id == job_id)
            drawl = 200 if job.task == "VoiceDesign" else 1  # what is kept as a voice lasts a second
            events.append(Pcm(job_id, pcm_of(word) * drawl))
            if not words:
                self.cancel(job_id)
                said = job.text.split()
                events.append(Done(job_id, "stop", Usage(input_tokens=len(said), output_tokens=2 * len(said))))
        return events

    def cancel(self, job_id: str) -> None:
        """Forget a job."""
        self._words.pop(job_id, None)

    def offload(self) -> None:
        """Move to the host; with a job in a slot that is a defect of who asks."""
        self._move(ModelState.OFFLOADED)

    def restore(self) -> None:
        """Move back."""
        self._move(ModelState.RESIDENT)

    def close(self) -> None:
        """Give everything up."""
        self._move(ModelState.ABSENT)

    def memory(self) -> Memory:
        """`n_bytes` wherever it is."""
        self._memory = self._device.put(self._model, self.state, self.n_bytes)
        return self._memory

    def _move(self, state: ModelState) -> None:
        assert not self._words
        self.state = state
        self.memory()


class _Inbox(queue.SimpleQueue[Any]):
    """An idle worker waits for the other threads, unless they are held, and never for the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.bench: WorkerBench

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002 -- SimpleQueue's
        del block, timeout
        return self._noted(super().get(timeout=10 if self.bench.expects_report else 0))

    def get_nowait(self) -> Any:
        return self._noted(super().get_nowait())

    def _noted(self, command: Any) -> Any:
        if isinstance(command, (FilesChecked, Downloaded)):
            self.bench.checkpoints.under_way[CheckFiles if isinstance(command, FilesChecked) else Download] -= 1
        if isinstance(command, (TransitionDone, TransitionFailed)):
            self.bench.in_transition = None
        return command


class _CountingCheckpoints(Checkpoints):
    """Counts what is under way: submitted, and not yet taken note of by the worker."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.under_way: Counter[type] = Counter()

    def submit(self, errand: CheckFiles | Download) -> None:
        self.under_way[type(errand)] += 1
        super().submit(errand)


class WorkerBench:
    """A Worker with the models of `sizes`, each opened as a SpeakingEngine.

    `gate`, cleared, holds the mover in a load. With `loses_transitions` no transition ends.
    `open_troubles` are raised by the next openings of a model.
    `files` are what there is of the models, `disk` keeps the voices. `sent` is everything the worker has said.
    """

    def __init__(
        self,
        voices_dir: Path,
        sizes: dict[str, int] | None = None,
        *,
        specs: list[ModelSpec] | None = None,
        device: FakeDevice | None = None,
        slots: int = 4,
        max_concurrency: int = 16,
        max_queue: int = 16,
        max_voices: int = 4,
        preload: tuple[str, ...] = (),
        stall_timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        self.sizes = sizes or {"m": 100}
        self.specs = specs or [a_spec(model, size) for model, size in self.sizes.items()]
        self.device = device or FakeDevice()
        self.clock = FakeClock()
        self.sent: list[tuple[bytes, Message, bytes | None]] = []
        self.opened: list[SpeakingEngine] = []
        self.engines: dict[str, SpeakingEngine] = {}
        self.open_troubles: dict[str, list[Exception]] = {}
        self.files = FakeFiles()
        self.load_s = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self._slots = slots
        self.inbox = _Inbox()
        self.inbox.bench = self
        options.setdefault("cleanup_enabled", False)
        self.mover = Mover(self.specs, self._open, self.device, self.inbox.put)
        self.checkpoints = _CountingCheckpoints(self.specs, self.files, self.inbox.put)
        self.in_transition: Transition | None = None
        self.loses_transitions = False
        self.residency = Residency(
            self.specs,
            ResidencyOptions(**options),
            probe=self.device,
            move=self._move,
            see_to_files=self.checkpoints.submit,
            clock=self.clock,
            wall=lambda: WALL + self.clock.now,
        )
        self.disk = SlowVoiceFiles(voices_dir)
        self.writer = SerialThread[VoiceWrite]("voices", lambda write: self.inbox.put(self.disk.write(write)))
        self.voices = VoiceStore(self.disk, self.writer.submit, max_voices, reserved={"preset"}, wall=lambda: WALL)
        self.worker = Worker(
            catalog=self.specs,
            send=lambda peer, message, payload: self.sent.append((peer, message, payload)),
            inbox=self.inbox,
            scheduler=Scheduler[Request](max_queue),
            residency=self.residency,
            voices=self.voices,
            reporter=Stats(
                boot_id="boot-1",
                default_model=self.specs[0].id,
                settings={"idle_timeout": 300.0},
                restarts=2,
                probe=self.device,
                shared_bytes=lambda: {"codec": 7},
                clock=self.clock,
            ),
            preload=list(preload),
            max_concurrency=max_concurrency,
            stall_timeout_s=stall_timeout_s,
            clock=self.clock,
        )
        self.mover.start()
        self.checkpoints.start()
        self.writer.start()

    def close(self) -> None:
        """End the threads."""
        self.gate.set()
        self.files.gate.set()
        self.disk.gate.set()
        self.mover.close(10)
        self.checkpoints.close(10)
        self.writer.close(10)

    # --- what a web worker says --------------------------------------------------------------------------------------

    def tell(self, message: Any, payload: bytes | None = None, peer: bytes = WEB) -> None:
        """A message is in the inbox."""
        self.inbox.put(Incoming(peer, message, payload))

    def speak(
        self, request_id: str, text: str, *, peer: bytes = WEB, payload: bytes | None = None, **changes: Any
    ) -> None:
        """Ask for speech, with credit enough for all of it unless told otherwise."""
        plain = Speak(id=request_id, client="alice", model="m", task="Base", text=text, credit=1_000)
        self.tell(msgspec.structs.replace(plain, **changes), payload, peer)

    def call(self, call_id: str, action: Action, payload: bytes | None = None, peer: bytes = WEB) -> None:
        """Ask for something else."""
        self.tell(Call(id=call_id, client="alice", action=action), payload, peer)

    def credit(self, request_id: str, chunks: int) -> None:
        """Give credit."""
        self.tell(Credit(id=request_id, chunks=chunks))

    def cancel(self, request_id: str, peer: bytes = WEB) -> None:
        """Nobody listens any more."""
        self.tell(Cancel(id=request_id), peer=peer)

    def save_voice(self, name: str, text: str | None = None) -> SavedVoice:
        """A voice that is there already."""
        self.call(f"save-{name}", CloneVoice(name=name, text=text), VOICE)
        self.settle()
        voice = self.answer(f"save-{name}").voice
        assert isinstance(voice, SavedVoice)
        return voice

    # --- running it --------------------------------------------------------------------------------------------------

    def turn(self, times: int = 1) -> None:
        """So many turns of the loop."""
        for _ in range(times):
            self.worker.turn()

    def settle(self) -> None:
        """Turn until nothing happens any more."""
        rest = 0
        for _ in range(10_000):
            before = self._progress()
            self.turn()
            still = before == self._progress() and not self.expects_report and self.inbox.empty()
            rest = rest + 1 if still else 0
            if rest == 3:
                return
        raise AssertionError("it does not come to rest")

    @property
    def is_moving(self) -> bool:
        """Whether a model is on its way."""
        return self.in_transition is not None

    @property
    def expects_report(self) -> bool:
        """Whether something will be reported that is not held."""
        if self.is_moving and self.gate.is_set() and not self.loses_transitions:
            return True
        if self.voices.writing and self.disk.gate.is_set():
            return True
        under_way = self.checkpoints.under_way
        return under_way[CheckFiles] > 0 or (under_way[Download] > 0 and self.files.gate.is_set())

    # --- what came of it ---------------------------------------------------------------------------------------------

    def heard(self, request_id: str, peer: bytes = WEB) -> list[Any]:
        """The messages for a request or call, in order."""
        return [message for to, message, _ in self.sent if to == peer and getattr(message, "id", None) == request_id]

    def kinds(self, request_id: str, peer: bytes = WEB) -> list[str]:
        """What those messages are."""
        return [type(message).__name__ for message in self.heard(request_id, peer)]

    def answer(self, request_id: str) -> Any:
        """The last message for a request or call."""
        return self.heard(request_id)[-1]

    def words(self, request_id: str, peer: bytes = WEB) -> str:
        """The words of a request that were sent."""
        said = [
            payload.rstrip(b"\0").decode()
            for to, message, payload in self.sent
            if to == peer and isinstance(message, Audio) and message.id == request_id and payload is not None
        ]
        return " ".join(said)

    def snapshot(self) -> Snapshot:
        """What the worker answers to a ping now."""
        self.tell(Ping())
        self.turn()
        return next(message.snapshot for _, message, _ in reversed(self.sent) if isinstance(message, Pong))

    def states(self) -> dict[str, str]:
        """Where each model is."""
        return {model.id: model.state for model in self.residency.statuses()}

    def references(self) -> dict[str, int]:
        """How many requests each model has."""
        return {model.id: model.references for model in self.residency.statuses()}

    def _progress(self) -> tuple[int, int, dict[str, str]]:
        return len(self.sent), sum(engine.steps for engine in self.opened), self.states()

    def _move(self, transition: Transition) -> None:
        self.in_transition = transition
        if not self.loses_transitions:
            self.mover.submit(transition)

    def _open(self, spec: ModelSpec) -> SpeakingEngine:
        assert self.gate.wait(10)
        self.clock.advance(self.load_s)
        if troubles := self.open_troubles.get(spec.id):
            raise troubles.pop(0)
        n_bytes = self.sizes.get(spec.id, 100)
        engine = SpeakingEngine(spec.id, self.device, self.clock, slots=self._slots, n_bytes=n_bytes)
        self.engines[spec.id] = engine
        self.opened.append(engine)
        return engine


def _raise_next(troubles: deque[Exception | None]) -> None:
    trouble = troubles.popleft() if troubles else None
    if trouble is not None:
        raise trouble
