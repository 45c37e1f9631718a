"""One request on its way through the worker, and where its speech goes. Owned by the synthesis thread alone."""

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from gpu_worker.engines.base import FinishReason, Job, JobError, Usage
from gpu_worker.playback import Playback
from shared.pcm import SAMPLE_RATE, bytes_for
from shared.protocol import Audio, Failed, Finished, Message, Started, StreamState, Timings

CLIENT_CHARS: Final = 20
"""Characters of a client's name that dashboards show: the digest of a key, or an IPv4 address, in full."""

Send = Callable[[Message, bytes | None], None]
"""Queues a message, with its payload, for the web worker that asked."""


class Sink(Protocol):
    """Where one request's speech goes."""

    @property
    def stalled(self) -> bool:
        """Whether it can take no more for now."""
        ...

    def started(self, model: str) -> None:
        """The request holds a slot."""
        ...

    def audio(self, pcm: bytes) -> None:
        """The next piece of speech: 24 kHz mono int16."""
        ...

    def finished(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Everything has been said."""
        ...

    def failed(self, error: JobError) -> None:
        """It did not work; nothing follows."""
        ...


class PeerSink:
    """Speech for a web worker, never more of it under way than that web worker gave credit for."""

    def __init__(self, request_id: str, send: Send, credit: int) -> None:
        self._id = request_id
        self._send = send
        self._credit = credit
        self._seq = 0
        # An engine may emit one more piece in the step that used up the credit, and its last word behind that.
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
        """The web worker can take `chunks` more."""
        self._credit += max(0, chunks)
        self._flush()

    def started(self, model: str) -> None:
        """Say that it holds a slot."""
        self._send(Started(id=self._id, model=model, sample_rate=SAMPLE_RATE), None)

    def audio(self, pcm: bytes) -> None:
        """Send the next piece, or keep it until there is credit."""
        self._waiting.append((Audio(id=self._id, seq=self._seq), pcm))
        self._seq += 1
        self._flush()

    def finished(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Say so, behind the last piece."""
        self._waiting.append((Finished(id=self._id, reason=reason, usage=usage, timings=timings), None))
        self._flush()

    def failed(self, error: JobError) -> None:
        """Say so at once: what was not sent yet would only delay it."""
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


class CollectingSink:
    """Speech for the worker's own use, whole: `on_done` gets it, or the error that prevented it."""

    def __init__(self, on_done: Callable[[bytes | JobError], None]) -> None:
        self._heard = bytearray()
        self._on_done = on_done

    stalled = False

    def started(self, model: str) -> None:
        """Nobody needs to know."""

    def audio(self, pcm: bytes) -> None:
        """Keep the next piece."""
        self._heard += pcm

    def finished(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:  # noqa: ARG002 -- the Sink's
        """Hand over the whole; speech that had to be cut off is none."""
        if reason == "length":
            self.failed(JobError("synthesis_failed", "the model did not come to an end of what it said; try again"))
            return
        self._on_done(bytes(self._heard))

    def failed(self, error: JobError) -> None:
        """Hand over the error."""
        self._on_done(error)


class Request:
    """A request from its place in the queue to its last word; times are the worker's monotonic seconds."""

    def __init__(
        self,
        *,
        peer: bytes,
        request_id: str,
        client: str,
        model: str,
        job: Job,
        sink: Sink,
        keep_alive_s: float | None,
        arrived: float,
    ) -> None:
        self.peer = peer
        self.id = request_id
        self.client = client
        self.model = model
        self.job = job
        self.sink = sink
        self.keep_alive_s = keep_alive_s
        self.arrived = arrived
        self.model_ready = arrived
        self.admitted: float | None = None
        self.first_audio: float | None = None
        self.stalled_since: float | None = None
        self.tried_again = False
        self.playback = Playback()

    def hand_on(self, pcm: bytes, now: float) -> None:
        """Give the next piece to whoever listens, and keep account of what a player makes of it."""
        self.sink.audio(pcm)
        self.playback.add(len(pcm) / bytes_for(1.0), now)
        if self.sink.stalled:
            self.playback.hold(now)

    def timings(self, now: float) -> Timings:
        """Where the time went, in seconds, up to `now`."""
        admitted = self.admitted if self.admitted is not None else now
        return Timings(
            queue_s=admitted - self.arrived,
            load_s=max(0.0, min(self.model_ready, admitted) - self.arrived),
            first_audio_s=(self.first_audio if self.first_audio is not None else now) - self.arrived,
            total_s=now - self.arrived,
        )

    def state(self, now: float) -> StreamState:
        """What dashboards are told of it."""
        stalled = self.sink.stalled
        return StreamState(
            id=self.id,
            model=self.model,
            client=self.client[:CLIENT_CHARS],
            state="waiting" if self.admitted is None else "stalled" if stalled else "speaking",
            age_s=round(now - self.arrived, 3),
            audio_s=round(self.playback.audio_s, 3),
        )


def failed_message(message_id: str, error: JobError) -> Failed:
    """A JobError as the web worker is told of it."""
    return Failed(
        id=message_id,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
    )
