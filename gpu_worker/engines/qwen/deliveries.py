"""Chunks between their decoding and the engine's events.

Deliveries hands due chunks to the vocoder, the most urgent first, and gives their PCM back in the same order.
The end of an utterance stands in that order, too. Events, and what a job does next, belong to the engine.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from gpu_worker.engines.qwen.runtime.transfers import HostCopy
from gpu_worker.engines.qwen.sequence import RunningJob, by_chunk_length, most_urgent_first
from gpu_worker.engines.qwen.vocoder import Vocoder
from shared.pcm import FRAME_SAMPLES

MAX_PENDING: Final = 2
"""Decoder calls that may still run on the device when a step returns."""


class UtteranceEnd(msgspec.Struct, frozen=True):
    """All PCM of an utterance comes before this entry."""

    sequence: RunningJob


class Delivery(msgspec.Struct, frozen=True):
    """PCM of the jobs of one decoder call, or the last PCM of an utterance and the job that `ended` it."""

    chunks: list[tuple[RunningJob, bytes]]
    ended: RunningJob | None = None


class Deliveries:
    """The decoder calls whose PCM no step has returned yet, the oldest first."""

    def __init__(self, vocoder: Vocoder, *, cuda: bool, interrupted: Callable[[], bool]) -> None:
        """`interrupted` returns True if a step should end early, because there is a command."""
        self._vocoder = vocoder
        self._cuda = cuda
        self._interrupted = interrupted
        self._pending: deque[HostCopy[list[RunningJob]] | UtteranceEnd] = deque()

    def __len__(self) -> int:
        return len(self._pending)

    def decode_due_chunks(self, sequences: Iterable[RunningJob]) -> bool:
        """Decode due chunks, the most urgent first. Returns False if the rest waits for the next step.

        On a CPU that is so if there is a command: it may be a request for speech, and a decode of all slots takes
        three times as long as a frame.
        """
        while due := [sequence for sequence in sequences if sequence.chunk_due]:
            for group in most_urgent_first(by_chunk_length(due)):
                self._pending.append(self._vocoder.decode(group))
                for sequence in group:
                    sequence.on_chunk_decoded()
                if not self._cuda and self._interrupted():
                    return False
        for sequence in sequences:
            if sequence.generating and sequence.ended and not sequence.pending_frames:
                sequence.finish_utterance()
                self._pending.append(UtteranceEnd(sequence))
        return True

    def oldest_ready(self) -> bool:
        """True if `take` has a delivery without waiting for the device."""
        return bool(self._pending) and _is_ready(self._pending[0])

    def take(self, max_pending: int) -> Delivery | None:
        """The oldest delivery. None if it is not ready and at most `max_pending` are left; else this waits for it."""
        if not self._pending:
            return None
        head = self._pending[0]
        if isinstance(head, UtteranceEnd):
            delivery = _end(head.sequence)
        elif len(self._pending) <= max_pending and not head.ready():
            return None
        else:
            delivery = Delivery(_chunks(head))
        self._pending.popleft()
        return delivery

    def clear(self) -> None:
        """Forget all deliveries. The device may still decode them."""
        self._pending.clear()


def _is_ready(delivery: HostCopy[list[RunningJob]] | UtteranceEnd) -> bool:
    return isinstance(delivery, UtteranceEnd) or delivery.ready()


def _end(sequence: RunningJob) -> Delivery:
    held = sequence.take_held()
    sequence.between = True
    return Delivery([] if held is None or not sequence.alive else [(sequence, held.tobytes())], ended=sequence)


def _chunks(decoded: HostCopy[list[RunningJob]]) -> list[tuple[RunningJob, bytes]]:
    chunks = []
    for sequence, samples in zip(decoded.record, decoded.wait().numpy(), strict=True):
        if sequence.alive:
            sequence.check_silence(samples, FRAME_SAMPLES)
            chunks.append((sequence, sequence.faded(samples).tobytes()))
    return chunks
