"""A request: its state, its times and what it has made. Owned by the synthesis thread alone.

    QUEUED -> RUNNING <-> PARKED
              RUNNING -> DRAINING -> DONE

Only `Request` writes the state. It knows neither queue nor engine nor model: `scheduling` keeps these in step with it.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, assert_never

import msgspec

from gpu_worker.engines.base import Done, Job, JobError, Reference
from gpu_worker.requests.playback import Playback
from gpu_worker.requests.sink import Sink, speech_error
from shared.pcm import bytes_for
from shared.protocol import (
    Append,
    EndText,
    KeyLimits,
    RateLimit,
    ShownState,
    Speak,
    SpeechError,
    SpeechOutcome,
    SpeechStatus,
    StreamState,
    Timings,
    Word,
)

BYTES_PER_S: Final = bytes_for(1.0)

CLIENT_CHARS: Final = 20
"""Characters of a client's name that dashboards show: the digest of a key, or an IPv4 address, in full."""

STALLED_AFTER_S: Final = 10.0
"""A reader that has taken nothing for so long, though audio waits for it, counts as stalled.

A reader at the speed of speech grants credit every 2.6 s: for 4 pieces of 0.64 s.
"""

BATCH_PATIENCE_S: Final = 60.0
"""A batch request that has waited for its slot for so long counts as any other, until it has had a slice of it."""

MIN_SLICE_S: Final = 0.2
"""The shortest stay in a slot, in seconds of the clock: to park and to unpark takes milliseconds."""


class RequestState(enum.Enum):
    """QUEUED: in the scheduler, and only then. RUNNING: holds a slot, and only then. PARKED: has left it for a while.

    Only QUEUED, RUNNING and PARKED requests hold a reference on their model. A request is counted when it is DONE.
    DRAINING: said in full; the last audio waits for credit. DONE: the last message is sent, or the request cancelled.
    """

    QUEUED = "queued"
    RUNNING = "running"
    PARKED = "parked"
    DRAINING = "draining"
    DONE = "done"


class Cancelled(msgspec.Struct, frozen=True):
    """Outcome of a request whose web worker cancelled it or is gone: no message follows.

    `error` is why its response failed; None: its client left.
    """

    error: SpeechError | None = None


Outcome = Done | JobError | Cancelled
"""The end of a request: said in full, failed, or cancelled."""

Ending = Literal["finished", "failed", "cancelled"]
"""The kind of an outcome, once the last message is sent."""


@dataclass(eq=False, kw_only=True)
class Request:
    """A request from the queue to its last message. Times are the worker's monotonic seconds.

    `state` is written here alone; see RequestState for what it implies.
    `parked_bytes` is the host RAM that its engine keeps for it while it is PARKED; it is counted in the sink's buffer.
    `is_batch`: no listener waits. `deadline_s`: the request fails if its audio begins later than so long after arrival.
    `traceparent` is the trace context of its web worker, see shared.trace_settings.
    `charged_s` is the audio that its client has been charged for, see Scheduler.
    `made_bytes` counts its audio, sent or waiting. `unread_since` is when its credit was used up; None with credit.
    `outcome` and `ended_at` are of its end; a DRAINING request may get a second one.
    Of an open request: `text_open` until its text has ended, `text_chars` so far, `held_text` that came before it had
    a slot, `first_text_at` when the first came, and `waits_since` when it began to wait for text.
    `text_cut` is the error that comes behind its audio, because the worker takes no more of its text.
    """

    peer: bytes
    id: str
    client: str
    model: str
    job: Job
    sink: Sink
    keep_alive_s: float | None
    arrived_at: float
    voice: str = ""
    is_batch: bool = False
    deadline_s: float | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)
    rate_limit: RateLimit | None = None
    traceparent: str = ""
    state: RequestState = field(default=RequestState.QUEUED, init=False)
    model_ready_at: float = field(default=0.0, init=False)
    started_at: float | None = field(default=None, init=False)
    first_audio_at: float | None = field(default=None, init=False)
    unread_since: float | None = field(default=None, init=False)
    parked_bytes: int = field(default=0, init=False)
    made_bytes: int = field(default=0, init=False)
    retried: bool = field(default=False, init=False)
    charged_s: float = field(default=0.0, init=False)
    outcome: Outcome | None = field(default=None, init=False)
    ended_at: float = field(default=0.0, init=False)
    text_open: bool = field(init=False)
    text_chars: int = field(init=False)
    first_text_at: float | None = field(init=False)
    held_text: list[Append | EndText] = field(default_factory=list, init=False)
    waits_since: float | None = field(default=None, init=False)
    text_cut: JobError | None = field(default=None, init=False)
    playback: Playback = field(default_factory=Playback, init=False)
    _waiting_since: float = field(default=0.0, init=False)
    _slot_since: float = field(default=0.0, init=False)
    _idle_since: float | None = field(default=None, init=False)
    _idle_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._waiting_since = self.arrived_at
        self.text_open = self.job.open
        self.text_chars = len(self.job.text)
        self.first_text_at = self.arrived_at if self.text_chars or not self.text_open else None

    @classmethod
    def of(cls, speak: Speak, *, peer: bytes, sink: Sink, reference: Reference | None, arrived_at: float) -> "Request":
        """The request that `speak` of the web worker `peer` asks for, with the recording that it clones."""
        return cls(
            peer=peer,
            id=speak.id,
            client=speak.client,
            model=speak.model,
            voice=speak.voice,
            is_batch=speak.priority == "batch",
            deadline_s=speak.deadline_s,
            limits=speak.limits,
            traceparent=speak.traceparent,
            sink=sink,
            keep_alive_s=speak.keep_alive_s,
            arrived_at=arrived_at,
            job=Job(
                id=f"{peer.hex()}-{speak.id}",
                task=speak.task,
                segments=speak.segments,
                voice="" if speak.saved_voice else speak.voice,
                language=speak.language,
                instructions=speak.instructions,
                reference=reference,
                sampling=speak.sampling,
                non_streaming_mode=speak.non_streaming_mode,
                timestamps=speak.timestamps,
                open=speak.open,
            ),
        )

    def take_text(self, message: Append | EndText, now: float) -> None:
        """The next text of an open request, or its end. A wait for text counts as no underrun of the player."""
        if isinstance(message, EndText):
            self.text_open = False
        else:
            self.text_chars += len(message.text)
            self.first_text_at = now if self.first_text_at is None else self.first_text_at
        if self.waits_since is not None:
            self.waits_since = None
            self.playback.resume(0.0, now)
        if self.state is RequestState.QUEUED:
            self.held_text.append(message)

    def yields(self, now: float) -> bool:
        """True if others come first: a batch request does, unless it has waited for BATCH_PATIENCE_S."""
        until = self._slot_since if self.state is RequestState.RUNNING else now
        return self.is_batch and until - self._waiting_since < BATCH_PATIENCE_S

    def is_late(self, now: float) -> bool:
        """True if it has a deadline, and the deadline has passed before its first audio."""
        is_silent = self.first_audio_at is None
        return self.deadline_s is not None and is_silent and now - self.arrived_at >= self.deadline_s

    def start(self, now: float) -> None:
        """QUEUED -> RUNNING: the engine has taken the job."""
        self.state = RequestState.RUNNING
        self.started_at = self._slot_since = now
        if self.sink.stalled:
            self.unread_since = now
        self.sink.started(self.model, self.rate_limit)

    def park(self, parked_bytes: int, now: float) -> None:
        """RUNNING -> PARKED: the engine keeps the job off its slot, in so many bytes of host RAM."""
        self.state = RequestState.PARKED
        if self.slice_s(now) >= MIN_SLICE_S:
            self._waiting_since = now
        self._count_parked(parked_bytes)
        self.set_idle(idle=True, now=now)

    def unpark(self, now: float) -> None:
        """PARKED -> RUNNING: the job has a slot again."""
        self.state = RequestState.RUNNING
        self._count_parked(0)
        self._slot_since = now
        self.set_idle(idle=False, now=now)

    def set_idle(self, *, idle: bool, now: float) -> None:
        """The engine makes no audio for the request, parked or held back; or it goes on."""
        if idle and self._idle_since is None:
            self._idle_since = now
        elif not idle and self._idle_since is not None:
            self._idle_s += now - self._idle_since
            self._idle_since = None

    def push(self, pcm: bytes, now: float, rate: float | None = 1.0, words: Sequence[Word] = ()) -> None:
        """Pass the next piece to the sink."""
        if self.first_audio_at is None:
            self.first_audio_at = now
        self.made_bytes += len(pcm)
        self._on_sent(self.sink.audio(pcm, rate, words), now)

    def grant(self, chunks: int, now: float) -> None:
        """The reader can take `chunks` more pieces. DRAINING -> DONE if these were the last."""
        if self.unread_since is not None:
            self.playback.resume(self.sink.unread_bytes / BYTES_PER_S, now)
        self.unread_since = None
        self._on_sent(self.sink.grant(chunks), now)
        if self.state is RequestState.DRAINING and self.sink.drained:
            self.state = RequestState.DONE

    def end(self, outcome: Outcome, now: float) -> None:
        """Pass the outcome to the sink. Any state -> DONE, or DRAINING if audio still waits for credit."""
        self._count_parked(0)
        self.outcome, self.ended_at = outcome, now
        match outcome:
            case Done() if self.text_cut is not None:
                self.outcome = self.text_cut
                self.sink.failed_behind_audio(self.text_cut)
            case Done(reason=reason, usage=usage):
                self.sink.finished(reason, usage, self.timings(now))
            case JobError():
                self.sink.failed(outcome)
            case Cancelled():
                self.sink.drop()
            case _:
                assert_never(outcome)
        self.state = RequestState.DONE if self.sink.drained else RequestState.DRAINING

    def _count_parked(self, parked_bytes: int) -> None:
        self.sink.buffer.add(parked_bytes - self.parked_bytes)
        self.parked_bytes = parked_bytes

    def _on_sent(self, sent_bytes: int, now: float) -> None:
        if sent_bytes:
            self.playback.add(sent_bytes / BYTES_PER_S, now)
        if self.sink.stalled and self.unread_since is None:
            self.unread_since = now

    @property
    def audio_s(self) -> float:
        """The audio that was made, in seconds."""
        return self.made_bytes / BYTES_PER_S

    def unread_s(self, now: float) -> float:
        """How long the reader has taken nothing, though it could have: 0 with credit."""
        return 0.0 if self.unread_since is None else now - self.unread_since

    def in_hand_s(self, now: float) -> float:
        """Audio that was made and that its listener has not heard yet."""
        unheard_s = self.playback.ahead_s(now)
        if self.sink.stalled:
            unheard_s = max(unheard_s, self.sink.unread_bytes / BYTES_PER_S)
        return self.sink.waiting_bytes / BYTES_PER_S + unheard_s

    def slice_s(self, now: float) -> float:
        """How long a running request has held its slot."""
        return now - self._slot_since

    def synthesis_s(self, now: float) -> float:
        """The time from the start up to `now`, without the time for which the engine made no audio for it."""
        idle_s = self._idle_s + (0.0 if self._idle_since is None else now - self._idle_since)
        return 0.0 if self.started_at is None else now - self.started_at - idle_s

    def timings(self, now: float) -> Timings:
        """The seconds that each stage has taken, up to `now`."""
        started_at = self.started_at if self.started_at is not None else now
        return Timings(
            queue_s=started_at - self.arrived_at,
            load_s=max(0.0, min(self.model_ready_at, started_at) - self.arrived_at),
            first_audio_s=(self.first_audio_at if self.first_audio_at is not None else now) - self.arrived_at,
            total_s=now - self.arrived_at,
        )

    def to_struct(self, now: float) -> StreamState:
        """The part of the request that dashboards show."""
        return StreamState(
            id=self.id,
            model=self.model,
            client=self.client[:CLIENT_CHARS],
            state=self.shown_state(now),
            age_s=round(now - self.arrived_at, 3),
            audio_s=round(self.audio_s, 3),
            buffered_s=round(self.sink.waiting_bytes / BYTES_PER_S, 3),
        )

    def to_outcome(self) -> SpeechOutcome:
        """The outcome of the request, or its progress."""
        status: SpeechStatus = "queued" if self.state is RequestState.QUEUED else "speaking"
        plain = SpeechOutcome(id=self.id, client=self.client, status=status, model=self.model, voice=self.voice)
        if self.state is not RequestState.DONE:
            return plain
        ended = msgspec.structs.replace(plain, timings=self.timings(self.ended_at))
        match self.outcome:
            case Done(reason=reason, usage=usage):
                return msgspec.structs.replace(ended, status="done", finish_reason=reason, usage=usage)
            case JobError():
                return msgspec.structs.replace(ended, status="failed", error=speech_error(self.outcome))
            case Cancelled(error=None) | None:
                return msgspec.structs.replace(ended, status="cancelled")
            case Cancelled(error=error):
                return msgspec.structs.replace(ended, status="failed", error=error)
            case _:
                assert_never(self.outcome)

    def shown_state(self, now: float) -> ShownState:
        """The state that dashboards show."""
        if self.state is RequestState.QUEUED:
            return "waiting"
        if self.unread_s(now) > STALLED_AFTER_S:
            return "stalled"
        return "generating" if self.state is RequestState.RUNNING else "buffered"
