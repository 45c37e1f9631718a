"""The way of one request's messages out: audio leaves as credit allows, and the rest waits in host RAM."""

from collections import deque
from collections.abc import Callable, Sequence

from gpu_worker.engines.base import FinishReason, JobError
from gpu_worker.requests.audio_buffer import AudioBuffer
from shared.pcm import SAMPLE_RATE
from shared.protocol import (
    Audio,
    Failed,
    Finished,
    Message,
    RateLimit,
    SpeechError,
    Started,
    Timings,
    Usage,
    Word,
)

Send = Callable[[Message, bytes | None], None]
"""Takes a message and its payload: audio, 24 kHz mono int16."""


class Sink:
    """Sends one request's speech: `send` gets its messages, never more audio than there is credit for.

    Audio without credit waits here: `waiting_bytes`, which are counted in `buffer`.
    `unread_bytes` of the audio that was sent were not granted back: the web worker has not passed them on yet.
    """

    def __init__(self, request_id: str, send: Send, credit: int, buffer: AudioBuffer) -> None:
        self._id = request_id
        self._send = send
        self._credit = credit
        self.buffer = buffer
        self._seq = 0
        self._waiting: deque[tuple[Message, bytes | None]] = deque()
        self._unread: deque[int] = deque()  # the size of each piece
        self.waiting_bytes = 0
        self.unread_bytes = 0

    @property
    def stalled(self) -> bool:
        """True if the credit is used up."""
        return self._credit <= 0

    @property
    def drained(self) -> bool:
        """True if everything has been sent."""
        return not self._waiting

    def grant(self, chunks: int) -> int:
        """Add credit for `chunks` pieces. Returns the bytes of audio sent. Negative credit counts as none."""
        self._credit += max(0, chunks)
        for _ in range(min(chunks, len(self._unread))):
            self.unread_bytes -= self._unread.popleft()
        return self._flush()

    def started(self, model: str, rate_limit: RateLimit | None = None) -> None:
        """Send Started."""
        self._send(Started(id=self._id, model=model, sample_rate=SAMPLE_RATE, rate_limit=rate_limit), None)

    def audio(self, pcm: bytes, rate: float | None = 1.0, words: Sequence[Word] = ()) -> int:
        """Send the next piece, or keep it until there is credit. Returns the bytes of audio sent."""
        self._waiting.append((Audio(id=self._id, seq=self._seq, rate=rate, words=list(words)), pcm))
        self._seq += 1
        self._count(len(pcm))
        return self._flush()

    def finished(self, reason: FinishReason, usage: Usage, timings: Timings) -> None:
        """Send Finished behind the last piece."""
        self._waiting.append((Finished(id=self._id, reason=reason, usage=usage, timings=timings), None))
        self._flush()

    def failed(self, error: JobError) -> None:
        """Send Failed at once, and drop the pieces that still wait."""
        self.drop()
        self._send(failed_message(self._id, error), None)

    def failed_behind_audio(self, error: JobError) -> None:
        """Send Failed behind the last piece."""
        self._waiting.append((failed_message(self._id, error), None))
        self._flush()

    def drop(self) -> None:
        """Drop the messages that still wait."""
        self._waiting.clear()
        self._count(-self.waiting_bytes)

    def _flush(self) -> int:
        sent_bytes = 0
        while self._waiting:
            message, payload = self._waiting[0]
            if payload is not None:
                if self._credit <= 0:
                    break
                self._credit -= 1
                self._unread.append(len(payload))
                sent_bytes += len(payload)
            self._waiting.popleft()
            self._send(message, payload)
        self.unread_bytes += sent_bytes
        self._count(-sent_bytes)
        return sent_bytes

    def _count(self, n_bytes: int) -> None:
        self.waiting_bytes += n_bytes
        self.buffer.add(n_bytes)


def speech_error(error: JobError) -> SpeechError:
    """`error` as a part of a SpeechOutcome."""
    return SpeechError(code=error.code, message=error.message, param=error.param)


def failed_message(message_id: str, error: JobError) -> Failed:
    """`error` as a message to the web worker."""
    return Failed(
        id=message_id,
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        rate_limit=error.rate_limit,
    )
