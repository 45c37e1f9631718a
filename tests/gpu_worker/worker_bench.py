"""WorkerBench: a worker of real parts, run turn by turn, with engines that speak words and a fake clock."""

import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from gpu_worker.engines.base import Done, EngineStats, Event, Fault, FinishReason, Job, JobError, Memory, Pcm
from gpu_worker.keys.limits import LimitCounter
from gpu_worker.keys.usage import AddUsage, UsageLog
from gpu_worker.lifecycle import RequestBounds
from gpu_worker.requests import Ending, Request
from gpu_worker.requests.audio_buffer import AudioBuffer
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
from gpu_worker.scheduling.scheduler import Scheduler
from gpu_worker.serial_thread import SerialThread
from gpu_worker.stats import Stats
from gpu_worker.transport import Incoming
from gpu_worker.voices import ConsentStore, FolderWatch, ScanFolder, VoiceStore, VoiceWrite
from gpu_worker.worker import Worker
from shared.catalog import ModelSpec
from shared.pcm import bytes_for
from shared.protocol import (
    Action,
    Append,
    Audio,
    CacheName,
    CacheStats,
    Call,
    Cancel,
    CloneVoice,
    Credit,
    EndText,
    FindUsage,
    Message,
    Ping,
    Pong,
    SavedVoice,
    Segment,
    Snapshot,
    Speak,
    SpeechError,
    Usage,
)
from tests.gpu_worker.fakes import WALL, FakeClock, FakeDevice, FakeFiles, SlowVoiceFiles, a_spec

WEB = b"web-1"
"""The web worker of a test that does not name one."""

OTHER = b"web-2"
"""Another web worker."""

VOICE = b"\3\7" * 24_000
"""A recording that a voice can be cloned from."""

FAULT = "fault"
"""The word at which a job fails by itself."""


def pcm_of(word: str) -> bytes:
    """The audio of a SpeakingEngine for a word."""
    return word.encode().ljust(8, b"\0")


class SpeakingEngine:
    """An engine that speaks `words_per_step` words of every job's text in every step, one unless a test sets it.

    The next calls of `admit`, `step`, `park` and `unpark` raise their errors, one each; None raises nothing.
    `text_errors` and `waits_errors` are those of the text of open jobs, and `runnable_errors` of `runnable`.
    A word lasts at least `word_s`.
    A step takes `step_s` on `clock`. `admitted` are the jobs that got a slot, in order.
    Jobs of a text in `muted` make no progress.
    A parked job keeps `parked_bytes`. `parked` are the ids of the parked jobs.
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
        self._parked: dict[str, deque[str]] = {}
        self._unfinished: dict[str, str] = {}  # the last words of open jobs
        self.parked_bytes = 10
        self.word_s = 0.0
        self.park_errors: deque[Exception | None] = deque()
        self.unpark_errors: deque[Exception | None] = deque()
        self.admit_errors: deque[Exception | None] = deque()
        self.step_errors: deque[Exception | None] = deque()
        self.text_errors: deque[Exception | None] = deque()
        self.waits_errors: deque[Exception | None] = deque()
        self.runnable_errors: deque[Exception | None] = deque()
        self.step_s = 0.0
        self.words_per_step = 1
        self.muted: set[str] = set()
        self.finish_reason: FinishReason = "stop"
        self.steps = 0
        self.batch_sizes: Counter[int] = Counter()
        self.emptied: list[CacheName] = []
        self.admitted: list[Job] = []
        self.warm_up_errors: deque[Exception | None] = deque()
        self.is_warm = False

    @property
    def jobs(self) -> set[str]:
        """The texts of the jobs in a slot."""
        return {job.text for job in self.admitted if job.id in self._words}

    @property
    def job_ids(self) -> set[str]:
        """The ids of the jobs in a slot."""
        return set(self._words)

    @property
    def parked(self) -> set[str]:
        """The ids of the parked jobs."""
        return set(self._parked)

    def warm_up(self) -> None:
        """Make the engine ready for its first job; until then it takes none."""
        assert self.state is ModelState.RESIDENT
        self.is_warm = True
        _raise_next(self.warm_up_errors)

    def capacity(self) -> int:
        """The free slots."""
        return self._slots - len(self._words)

    def admit(self, job: Job) -> None:
        """Take a job; the caller must not ask for more slots than there are."""
        assert self.state is ModelState.RESIDENT
        assert self.is_warm
        assert self.capacity() > 0
        assert job.id not in self._words
        assert job.id not in self._parked
        _raise_next(self.admit_errors)
        self.admitted.append(job)
        self._words[job.id] = deque(() if job.open else job.text.split())
        if job.open:
            self._unfinished[job.id] = ""
            self._add_text(job.id, job.text)

    def append(self, job_id: str, text: str, *, flush: bool) -> None:
        """Add text to an open job; its last word may still grow."""
        _raise_next(self.text_errors)
        if job_id in self._unfinished:
            self._add_text(job_id, text + " " * flush)

    def _add_text(self, job_id: str, text: str) -> None:
        *words, self._unfinished[job_id] = (self._unfinished[job_id] + text).split(" ")
        self._words_of(job_id).extend(word for word in words if word)

    def end_text(self, job_id: str) -> None:
        """The last word of an open job is complete."""
        _raise_next(self.text_errors)
        self._words_of(job_id).extend(self._unfinished.pop(job_id, "").split())

    def waits_for_text(self, job_id: str) -> bool:
        """Whether all words of an open job are spoken."""
        _raise_next(self.waits_errors)
        return job_id in self._unfinished and not self._words_of(job_id)

    def _words_of(self, job_id: str) -> deque[str]:
        return self._words[job_id] if job_id in self._words else self._parked.get(job_id, deque())

    def is_faster_alone(self) -> bool:
        """Others leave a step to a newcomer."""
        return True

    def runnable(self, stalled: Collection[str]) -> bool:
        """Whether any job is neither stalled nor muted."""
        _raise_next(self.runnable_errors)
        return bool(self._able(stalled))

    def step(self, stalled: Collection[str]) -> list[Event]:
        """Speak the next words of every job that is not stalled."""
        assert self.state is ModelState.RESIDENT
        self.steps += 1
        _raise_next(self.step_errors)
        self._clock.advance(self.step_s)
        self.batch_sizes[len(self._able(stalled))] += 1
        return [event for job in self._able(stalled) for event in self._speak(job)]

    def _able(self, stalled: Collection[str]) -> list[Job]:
        latest = {job.id: job for job in self.admitted}
        jobs = [latest[job_id] for job_id in self._words if job_id not in stalled]
        return [job for job in jobs if job.text not in self.muted and not self.waits_for_text(job.id)]

    def _speak(self, job: Job) -> Iterator[Event]:
        words = self._words[job.id]
        for word in [words.popleft() for _ in range(min(self.words_per_step, len(words)))]:
            if word == FAULT:
                self.cancel(job.id)
                yield Fault(job.id, JobError("invalid_audio", "this one cannot be said", param="ref_audio"))
                return
            repeats = 200 if job.task == "VoiceDesign" else 1  # a saved voice lasts at least a second
            yield Pcm(job.id, (pcm_of(word) * repeats).ljust(bytes_for(self.word_s), b"\0"))
        if not words and job.id not in self._unfinished:
            self.cancel(job.id)
            count = len(job.text.split())
            yield Done(job.id, self.finish_reason, Usage(input_tokens=count, output_tokens=2 * count))

    def park(self, job_id: str) -> int:
        """Free the slot of a job, and keep the words that it has not spoken."""
        _raise_next(self.park_errors)
        if job_id in self._words:
            self._parked[job_id] = self._words.pop(job_id)
        return self.parked_bytes if job_id in self._parked else 0

    def park_bytes(self, job_id: str) -> int:
        """`parked_bytes`, for every job."""
        del job_id
        return self.parked_bytes

    def unpark(self, job_id: str) -> None:
        """Give a parked job a slot; the caller must not ask for more slots than there are."""
        _raise_next(self.unpark_errors)
        assert self.state is ModelState.RESIDENT
        assert self.capacity() > 0
        if job_id in self._parked:
            self._words[job_id] = self._parked.pop(job_id)

    def cancel(self, job_id: str) -> None:
        """Drop a job, in a slot or parked."""
        self._words.pop(job_id, None)
        self._parked.pop(job_id, None)
        self._unfinished.pop(job_id, None)

    def offload(self) -> None:
        """Move the weights to the host; the caller must not do that while a job holds a slot."""
        self._move(ModelState.OFFLOADED)

    def restore(self) -> None:
        """Move the weights back."""
        self._move(ModelState.RESIDENT)

    def close(self) -> None:
        """Free the weights."""
        self._move(ModelState.ABSENT)

    def memory(self) -> Memory:
        """`n_bytes`, wherever they are."""
        self._memory = self._device.put(self._model, self.state, self.n_bytes)
        if self._parked:
            host = {**self._memory.host, "parked": self.parked_bytes * len(self._parked)}
            return msgspec.structs.replace(self._memory, host=host)
        return self._memory

    def stats(self) -> EngineStats:
        """The steps by their jobs; each was captured. One cache, which is never empty."""
        cache = CacheStats(name="references", entries=1, bytes=5, hits=3, misses=2)
        return EngineStats(batch_sizes=dict(self.batch_sizes), captured_steps=self.batch_sizes.total(), caches=[cache])

    def empty_cache(self, name: CacheName) -> None:
        """Note the name."""
        self.emptied.append(name)

    def _move(self, state: ModelState) -> None:
        assert not self._words
        assert not self._parked
        self.state = state
        self.is_warm = False
        self.memory()


class _Inbox(queue.SimpleQueue[Any]):
    """An idle worker waits for a report of the other threads if one is expected, and never for the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.bench: WorkerBench

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002 -- SimpleQueue's
        del block, timeout
        return self._record(super().get(timeout=10 if self.bench.expects_report else 0))

    def get_nowait(self) -> Any:
        return self._record(super().get_nowait())

    def _record(self, command: Any) -> Any:
        if isinstance(command, (FilesChecked, Downloaded)):
            self.bench.checkpoints.pending[CheckFiles if isinstance(command, FilesChecked) else Download] -= 1
        if isinstance(command, (TransitionDone, TransitionFailed)):
            self.bench.in_transition = None
        return command


class _CountingCheckpoints(Checkpoints):
    """Counts the checks and downloads whose report the worker has not handled yet."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pending: Counter[type] = Counter()

    def submit(self, work: CheckFiles | Download) -> None:
        self.pending[type(work)] += 1
        super().submit(work)


class _RecordingScheduler(Scheduler):
    """Keeps every request that was ever queued."""

    def __init__(self, max_queue: int, clock: FakeClock) -> None:
        super().__init__(max_queue, clock)
        self.submitted: list[Request] = []

    def submit(self, request: Request, slots: int, *, free_slots: int = 0, can_start: bool = False) -> None:
        super().submit(request, slots, free_slots=free_slots, can_start=can_start)
        self.submitted.append(request)


class WorkerBench:
    """A Worker with the models of `sizes`, each with a SpeakingEngine.

    While `load_gate` is cleared, loads wait. With `loses_transitions` no transition ends.
    The next loads of a model raise its `open_errors`, one each.
    `files` are the files of models, `voice_files` those of voices. `sent` is every message of the worker.
    `scheduler.submitted` is every request that was ever queued. `on_request_over` is the Worker's.
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
        open_text_timeout_s: float = 30.0,
        max_input_chars: int = 4096,
        buffer_bytes: int = 2**24,
        **options: Any,
    ) -> None:
        self.sizes = sizes or {"m": 100}
        self.specs = specs or [a_spec(model, size) for model, size in self.sizes.items()]
        self.device = device or FakeDevice()
        self.clock = FakeClock()
        self.sent: list[tuple[bytes, Message, bytes | None]] = []
        self.opened: list[SpeakingEngine] = []
        self.engines: dict[str, SpeakingEngine] = {}
        self.open_errors: dict[str, list[Exception]] = {}
        self.files = FakeFiles()
        self.load_s = 0.0
        self.load_gate = threading.Event()
        self.load_gate.set()
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
        self.voice_files = SlowVoiceFiles(voices_dir)
        self.voice_writer = SerialThread[VoiceWrite | ScanFolder](
            "voices", lambda work: self.inbox.put(self.voice_files.handle(work))
        )
        self.voices_folder = FolderWatch(self.voice_writer.submit, clock=self.clock)
        self.voices = VoiceStore(
            self.voice_files, self.voice_writer.submit, max_voices, reserved={"preset"}, wall=lambda: WALL
        )
        self.consents = ConsentStore(self.voice_files, self.voice_writer.submit, max_voices, wall=lambda: WALL)
        self.buffer = AudioBuffer(buffer_bytes)
        self.scheduler = _RecordingScheduler(max_queue, self.clock)
        self.on_request_over: Callable[[Request, Ending], None] = lambda _request, _ending: None
        self.usage_work: list[AddUsage | FindUsage] = []
        self.worker = Worker(
            catalog=self.specs,
            send=lambda peer, message, payload: self.sent.append((peer, message, payload)),
            inbox=self.inbox,
            scheduler=self.scheduler,
            residency=self.residency,
            voices=self.voices,
            consents=self.consents,
            voices_folder=self.voices_folder,
            stats=Stats(
                boot_id="boot-1",
                default_model=self.specs[0].id,
                settings={"idle_timeout": 300.0},
                restarts=2,
                probe=self.device,
                shared_bytes=lambda: {"codec": 7},
                clock=self.clock,
            ),
            preload=list(preload),
            buffer=self.buffer,
            max_concurrency=max_concurrency,
            bounds=RequestBounds(
                stall_timeout_s=stall_timeout_s,
                open_text_timeout_s=open_text_timeout_s,
                max_input_chars=max_input_chars,
            ),
            limits=LimitCounter(self.clock, lambda: WALL + self.clock.now),
            usage=UsageLog(self.usage_work.append, clock=self.clock, wall_clock=lambda: WALL + self.clock.now),
            clock=self.clock,
            on_request_over=lambda request, ending: self.on_request_over(request, ending),  # noqa: PLW0108 -- a test sets it later
        )

    def close(self) -> None:
        """End the threads."""
        self.load_gate.set()
        self.files.gate.set()
        self.voice_files.gate.set()
        self.mover.close(10)
        self.checkpoints.close(10)
        self.voice_writer.close(10)

    # --- messages of a web worker ------------------------------------------------------------------------------------

    def send(self, message: Any, payload: bytes | None = None, peer: bytes = WEB) -> None:
        """Put a message into the inbox."""
        self.inbox.put(Incoming(peer, message, payload))

    def speak(
        self, request_id: str, text: str, *, peer: bytes = WEB, payload: bytes | None = None, **changes: Any
    ) -> None:
        """Send a Speak, with credit for all of the speech unless `changes` say otherwise."""
        plain = Speak(
            id=request_id, client="alice", model="m", task="Base", segments=[Segment(text=text)], credit=1_000
        )
        self.send(msgspec.structs.replace(plain, **changes), payload, peer)

    def call(self, call_id: str, action: Action, payload: bytes | None = None, peer: bytes = WEB) -> None:
        """Send a Call."""
        self.send(Call(id=call_id, client="alice", action=action), payload, peer)

    def append(self, request_id: str, text: str, *, flush: bool = False) -> None:
        """Send an Append."""
        self.send(Append(id=request_id, text=text, flush=flush))

    def end_text(self, request_id: str) -> None:
        """Send an EndText."""
        self.send(EndText(id=request_id))

    def credit(self, request_id: str, chunks: int) -> None:
        """Send a Credit."""
        self.send(Credit(id=request_id, chunks=chunks))

    def cancel(self, request_id: str, peer: bytes = WEB, error: SpeechError | None = None) -> None:
        """Send a Cancel."""
        self.send(Cancel(id=request_id, error=error), peer=peer)

    def jobs_of(self, call: str, model: str = "m") -> list[str]:
        """The jobs for which the engine's method `call` is called from now on."""
        jobs: list[str] = []
        method = getattr(self.engines[model], call)

        def noted(job_id: str) -> Any:
            jobs.append(job_id)
            return method(job_id)

        setattr(self.engines[model], call, noted)
        return jobs

    def save_voice(self, name: str, text: str | None = None) -> SavedVoice:
        """Save a voice and wait for it."""
        voice = self.result_of(CloneVoice(name=name, text=text), VOICE, call_id=f"save-{name}").voice
        assert isinstance(voice, SavedVoice)
        return voice

    # --- running it --------------------------------------------------------------------------------------------------

    def turn(self, times: int = 1) -> None:
        """Run so many turns of the loop."""
        for _ in range(times):
            self.worker.turn()

    def settle(self) -> None:
        """Run turns until nothing changes any more."""
        rest = 0
        for _ in range(10_000):
            before = self._progress()
            self.turn()
            still = before == self._progress() and not self.expects_report and self.inbox.empty()
            rest = rest + 1 if still else 0
            if rest == 3:
                return
        raise AssertionError("the worker does not settle")

    @property
    def is_moving(self) -> bool:
        """Whether a model is in transition."""
        return self.in_transition is not None

    @property
    def expects_report(self) -> bool:
        """Whether a thread will report something that no gate holds up."""
        if self.is_moving and self.load_gate.is_set() and not self.loses_transitions:
            return True
        if (self.voices.writing or self.consents.writing) and self.voice_files.gate.is_set():
            return True
        if self.voices_folder.scanning and self.voice_files.gate.is_set():
            return True
        pending = self.checkpoints.pending
        return pending[CheckFiles] > 0 or (pending[Download] > 0 and self.files.gate.is_set())

    # --- results ---------------------------------------------------------------------------------------------

    def messages(self, request_id: str, peer: bytes = WEB) -> list[Any]:
        """The messages for a request or call, in order."""
        return [message for to, message, _ in self.sent if to == peer and getattr(message, "id", None) == request_id]

    def kinds(self, request_id: str, peer: bytes = WEB) -> list[str]:
        """The types of those messages."""
        return [type(message).__name__ for message in self.messages(request_id, peer)]

    def last_message(self, request_id: str) -> Any:
        """The last message for a request or call."""
        return self.messages(request_id)[-1]

    def words(self, request_id: str, peer: bytes = WEB) -> str:
        """The words of a request that were sent."""
        said = [
            payload[:8].rstrip(b"\0").decode()
            for to, message, payload in self.sent
            if to == peer and isinstance(message, Audio) and message.id == request_id and payload is not None
        ]
        return " ".join(said)

    def result_of(self, action: Action, payload: bytes | None = None, call_id: str = "c") -> Any:
        """The one answer to a call, after everything has settled."""
        before = len(self.messages(call_id))
        self.call(call_id, action, payload)
        self.settle()
        (answer,) = self.messages(call_id)[before:]
        return answer

    def snapshot(self) -> Snapshot:
        """The snapshot in the answer to a Ping."""
        self.send(Ping())
        self.turn()
        return next(message.snapshot for _, message, _ in reversed(self.sent) if isinstance(message, Pong))

    def states(self) -> dict[str, str]:
        """The state of each model."""
        return {model.id: model.state for model in self.residency.statuses()}

    def references(self) -> dict[str, int]:
        """The references of each model."""
        return {model.id: model.references for model in self.residency.statuses()}

    def _progress(self) -> tuple[int, int, dict[str, str]]:
        return len(self.sent), sum(engine.steps for engine in self.opened), self.states()

    def _move(self, transition: Transition) -> None:
        self.in_transition = transition
        if not self.loses_transitions:
            self.mover.submit(transition)

    def _open(self, spec: ModelSpec) -> SpeakingEngine:
        assert self.load_gate.wait(10)
        self.clock.advance(self.load_s)
        if errors := self.open_errors.get(spec.id):
            raise errors.pop(0)
        n_bytes = self.sizes.get(spec.id, 100)
        engine = SpeakingEngine(spec.id, self.device, self.clock, slots=self._slots, n_bytes=n_bytes)
        self.engines[spec.id] = engine
        self.opened.append(engine)
        return engine


def _raise_next(errors: deque[Exception | None]) -> None:
    error = errors.popleft() if errors else None
    if error is not None:
        raise error


MakeBench = Callable[..., WorkerBench]
"""The fixture `make_bench`: takes the arguments of WorkerBench without its directory."""


def loaded(bench: WorkerBench, *models: str) -> WorkerBench:
    """The bench with these models resident, each after one request; their messages are dropped."""
    for model in models or ("m",):
        bench.speak(f"first-{model}", "hello", model=model)
    bench.settle()
    bench.sent.clear()
    return bench
