"""Chunks between their decoding and the engine's events.

Deliveries hands due chunks to the vocoder, the most urgent first, and gives their PCM back in the same order.
The end of an utterance stands in that order, too. Events, and what a job does next, belong to the engine.

With a thread for the codec, chunks of the largest size are decoded there while the engine makes frames. All others,
an utterance's first and last ones, are decoded by the step as without it: they are urgent, and never wait for a large
one of another job. A job has one chunk at the codec at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from gpu_worker.engines.qwen.chunk_schedule import MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec_thread import CodecThread
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


class ChunksBeside(msgspec.Struct, frozen=True):
    """The chunks that the codec's thread decodes: their jobs, and the slots that these had then."""

    group: list[RunningJob]
    slots: set[int]


DecoderThread = CodecThread[HostCopy[list[RunningJob]]]


class Deliveries:
    """The decoder calls whose PCM no step has returned yet, the oldest first."""

    def __init__(
        self, vocoder: Vocoder, *, cuda: bool, interrupted: Callable[[], bool], thread: DecoderThread | None = None
    ) -> None:
        """`interrupted` returns True if a step should end early, because there is a command."""
        self._vocoder = vocoder
        self._cuda = cuda
        self._interrupted = interrupted
        self._thread = thread
        self._beside: ChunksBeside | None = None
        self._failed: list[RunningJob] = []
        """Jobs whose chunks failed on the thread. The step itself decodes them again, and fails if they fail again."""
        self._pending: deque[HostCopy[list[RunningJob]] | UtteranceEnd] = deque()

    def __len__(self) -> int:
        """Those that `take` and `take_from_thread` have without waiting for a thread."""
        return len(self._pending) + (self._thread is not None and self._thread.done())

    def can_decode(self, sequence: RunningJob) -> bool:
        """True if `decode_due_chunks` would decode a chunk of this job."""
        return sequence.chunk_due and (self._beside is None or sequence not in self._beside.group)

    def uses(self, slot: int) -> bool:
        """True if the codec's thread reads and writes the codec stream of `slot`, perhaps of a job that is gone."""
        return self._beside is not None and slot in self._beside.slots

    def wait_for(self, slot: int) -> None:
        """Wait until the codec's thread has left `slot`. Call before anything else touches its codec stream."""
        if self._thread is not None and self.uses(slot):
            self._thread.wait()

    def take_from_thread(self) -> bool:
        """Add the chunks that the codec's thread has decoded. True if there are some.

        Raises what their decoding raised: the chunks are due again then. That of jobs that are gone is dropped.
        """
        if self._thread is None or self._beside is None or not self._thread.done():
            return False
        group, self._beside = self._beside.group, None
        try:
            self._pending.append(self._thread.take())
        except BaseException:
            self._failed = [sequence for sequence in group if sequence.alive]
            if self._failed:
                raise
            return False
        for sequence in group:
            sequence.on_chunk_decoded(MAX_CHUNK_FRAMES)
        return True

    def decode_due_chunks(self, sequences: Iterable[RunningJob]) -> bool:
        """Decode due chunks, the most urgent first. Returns False if the rest waits for the next step.

        On a CPU that is so if there is a command: it may be a request for speech, and a decode of all slots takes
        three times as long as a frame.
        """
        while due := [sequence for sequence in sequences if self.can_decode(sequence)]:
            for group in most_urgent_first(by_chunk_length(due)):
                ours = self._leave_to_thread(group)
                if not ours:
                    continue
                frames = ours[0].next_chunk
                self._pending.append(self._vocoder.decode(ours))
                self._failed = [sequence for sequence in self._failed if sequence not in ours]
                for sequence in ours:
                    sequence.on_chunk_decoded(frames)
                if not self._cuda and self._interrupted():
                    return False
        for sequence in sequences:
            if sequence.generating and sequence.ended and not sequence.pending_frames:
                sequence.finish_utterance()
                self._pending.append(UtteranceEnd(sequence))
        return True

    def _leave_to_thread(self, group: list[RunningJob]) -> list[RunningJob]:
        """Start to decode chunks on the codec's thread, if it is free. Returns the jobs whose chunks are left.

        These are the most urgent ones, if there are more than the thread decodes in the time until their next chunks.
        """
        thread = self._thread
        if thread is None or thread.busy or group[0].next_chunk < MAX_CHUNK_FRAMES:
            return group
        if any(sequence in self._failed for sequence in group):
            return group
        by_urgency = sorted(group, key=lambda sequence: sequence.underrun_at)
        ours, theirs = by_urgency[: -thread.streams], by_urgency[-thread.streams :]
        thread.start(self._vocoder.decode_later(theirs))
        self._beside = ChunksBeside(theirs, {sequence.slot for sequence in theirs})
        return ours

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
            delivery = Delivery(_chunks(head, drop_behind_silence=self._thread is not None))
        self._pending.popleft()
        return delivery

    def clear(self) -> None:
        """Forget all deliveries. The device may still decode them; the codec's thread does not."""
        self._pending.clear()
        self._beside, self._failed = None, []
        if self._thread is not None:
            self._thread.drop()


def _is_ready(delivery: HostCopy[list[RunningJob]] | UtteranceEnd) -> bool:
    return isinstance(delivery, UtteranceEnd) or delivery.ready()


def _end(sequence: RunningJob) -> Delivery:
    held = sequence.take_held()
    sequence.between = True
    return Delivery([] if held is None or not sequence.alive else [(sequence, held.tobytes())], ended=sequence)


def _chunks(decoded: HostCopy[list[RunningJob]], *, drop_behind_silence: bool) -> list[tuple[RunningJob, bytes]]:
    chunks = []
    for sequence, samples in zip(decoded.record, decoded.wait().numpy(), strict=True):
        if sequence.alive:
            sequence.check_silence(samples, FRAME_SAMPLES)
            if drop_behind_silence:
                sequence.drop_frames_behind_silence()
            chunks.append((sequence, sequence.faded(samples).tobytes()))
    return chunks
