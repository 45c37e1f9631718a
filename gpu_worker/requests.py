"""A request: its state, its sink and its playback clock. Owned by the synthesis thread alone.

    QUEUED -> RUNNING -> DRAINING -> DONE

Only `Request` writes the state. It knows neither queue nor engine nor model: the Worker keeps these in step with it.
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, assert_never

import msgspec

from gpu_worker.engines.base import Done, FinishReason, Job, JobError
from shared.pcm import SAMPLE_RATE, bytes_for
from shared.protocol import Audio, Failed, Finished, Message, Started, StreamState, Timings, Usage

CLIENT_CHARS: Final = 20
"""Characters of a client's name that dashboards show: the digest of a key, or an IPv4 address, in full."""

Send = Callable[[Message, bytes | None], None]
"""Takes a message and its payload: audio, 24 kHz mono int16."""


class RequestState(enum.Enum):
    """QUEUED: in the scheduler, and only then. RUNNING: holds a slot, and only then.

    Only QUEUED and RUNNING requests hold a reference on their model. A request is counted when it leaves these states.
    DRAINING: said in full; the last audio waits for credit. DONE: the last message is sent, or the request cancelled.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DRAINING = "draining"
    DONE = "done"


class Cancelled(msgspec.Struct, frozen=True):
    """Outcome of a request whose web worker cancelled it or is gone: no message follows."""


Outcome = Done | JobError | Cancelled
"""How a request ends: said in full, failed, or cancelled."""


class Sink:
    """Where one request's speech goes: `send` gets its messages, never more audio than there is credit for."""

    def __init__(self, request_id: str, send: Send, credit: int) -> None:
        self._id = request_id
        self._send = send
        self._credit = credit
        self._seq = 0
        # An engine may emit one more piece in the step that used up the credit, and Finished follows behind it.
        self._waiting: deque[tuple[Message, bytes | None]] = deque()

    @property
    def stalled(self) -> bool:
        """Whether the credit is used up."""
        return self._credit <= 0

    @property
    def drained(self) -> bool:
        """Whether everything has been sent."""
        return not self._waiting

    def grant(self, chunks: int) -> None:
        """Add credit for `chunks` pieces, and send what waited for it. Negative credit counts as none."""
        self._credit += max(0, chunks)
        self._flush()

    def started(self, model: str) -> None:
        """Send Started."""
        self._send(Started(id=self._id, model=model, sample_rate=SAMPLE_RATE), None)

    def audio(self, pcm: bytes) -> None:
        """Send the next piece, or keep it until there is credit."""
        self._waiting.append((Audio(id=self._id, seq=self._seq), pcm))
        self._seq += 1
        self._flush()

    def finished(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Send Finished behind the last piece."""
        self._waiting.append((Finished(id=self._id, reason=reason, usage=usage, timings=timings), None))
        self._flush()

    def failed(self, error: JobError) -> None:
        """Send Failed at once, and drop the pieces that still wait."""
        self._waiting.clear()
        self._send(failed_message(self._id, error), None)

    def _flush(self) -> None:
        while self._waiting:
            message, payload = self._waiting[0]
            if payload is not None:
                if self._credit <= 0:
                    return
                self._credit -= 1
            self._waiting.popleft()
            self._send(message, payload)


class Playback:
    """The clock of a player that starts with the first piece and keeps nothing back: the strictest there is.

    `now` is the worker's monotonic seconds. `audio_s` is the audio delivered, `underrun_s` how long the player had run
    out of it, `paused_s` how long the reader took nothing: the player stands still then, and that is no underrun.
    """

    def __init__(self) -> None:
        self.audio_s = 0.0
        self.underrun_s = 0.0
        self.paused_s = 0.0
        self._ends_at: float | None = None
        self._paused_at: float | None = None

    def add(self, seconds: float, now: float) -> None:
        """Deliver the next piece."""
        if self._paused_at is not None:
            now = self._paused_at
        if self._ends_at is None:
            self._ends_at = now
        elif now > self._ends_at:
            self.underrun_s += now - self._ends_at
            self._ends_at = now
        self._ends_at += seconds
        self.audio_s += seconds

    def pause(self, now: float) -> None:
        """The reader takes no more for now."""
        if self._paused_at is None:
            self._paused_at = now

    def resume(self, now: float) -> None:
        """The reader takes more again; no effect if it was not paused."""
        if self._paused_at is None:
            return
        paused_s = now - self._paused_at
        self._paused_at = None
        self.paused_s += paused_s
        if self._ends_at is not None:
            self._ends_at += paused_s


@dataclass(eq=False, kw_only=True)
class Request:
    """A request from the queue to its last message. Times are the worker's monotonic seconds.

    `state` is written here alone; see RequestState for what it implies.
    """

    peer: bytes
    id: str
    client: str
    model: str
    job: Job
    sink: Sink
    keep_alive_s: float | None
    arrived_at: float
    state: RequestState = field(default=RequestState.QUEUED, init=False)
    model_ready_at: float = field(default=0.0, init=False)
    started_at: float | None = field(default=None, init=False)
    first_audio_at: float | None = field(default=None, init=False)
    stalled_since: float | None = field(default=None, init=False)
    retried: bool = field(default=False, init=False)
    playback: Playback = field(default_factory=Playback, init=False)

    @property
    def stalled(self) -> bool:
        """Whether the request could go on, or end, if its reader took more."""
        return self.state is not RequestState.QUEUED and self.sink.stalled

    def start(self, now: float) -> None:
        """QUEUED -> RUNNING: the engine has taken the job."""
        self.state = RequestState.RUNNING
        self.started_at = now
        self.sink.started(self.model)

    def push(self, pcm: bytes, now: float) -> None:
        """Pass the next piece to the sink, and advance the playback clock."""
        if self.first_audio_at is None:
            self.first_audio_at = now
        self.sink.audio(pcm)
        self.playback.add(len(pcm) / bytes_for(1.0), now)
        if self.sink.stalled:
            self.playback.pause(now)

    def grant(self, chunks: int, now: float) -> None:
        """The reader can take `chunks` more pieces. DRAINING -> DONE if these were the last."""
        self.sink.grant(chunks)
        self.stalled_since = None
        if not self.sink.stalled:
            self.playback.resume(now)
        if self.state is RequestState.DRAINING and self.sink.drained:
            self.state = RequestState.DONE

    def end(self, outcome: Outcome, now: float) -> None:
        """Pass the outcome to the sink. Any state -> DONE, or DRAINING if audio still waits for credit."""
        match outcome:
            case Done(reason=reason, usage=usage):
                self.sink.finished(reason, usage, self.timings(now))
            case JobError():
                self.sink.failed(outcome)
            case Cancelled():
                self.state = RequestState.DONE
                return
            case _:
                assert_never(outcome)
        self.state = RequestState.DONE if self.sink.drained else RequestState.DRAINING

    def timings(self, now: float) -> Timings:
        """Where the time went, in seconds, up to `now`."""
        started_at = self.started_at if self.started_at is not None else now
        return Timings(
            queue_s=started_at - self.arrived_at,
            load_s=max(0.0, min(self.model_ready_at, started_at) - self.arrived_at),
            first_audio_s=(self.first_audio_at if self.first_audio_at is not None else now) - self.arrived_at,
            total_s=now - self.arrived_at,
        )

    def to_struct(self, now: float) -> StreamState:
        """The part of the request that dashboards show."""
        queued = self.state is RequestState.QUEUED
        return StreamState(
            id=self.id,
            model=self.model,
            client=self.client[:CLIENT_CHARS],
            state="waiting" if queued else "stalled" if self.stalled else "speaking",
            age_s=round(now - self.arrived_at, 3),
            audio_s=round(self.playback.audio_s, 3),
        )


def failed_message(message_id: str, error: JobError) -> Failed:
    """`error` as a message to the web worker."""
    return Failed(
        id=message_id,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
    )
