"""From frames of codes to PCM: gathers due chunks from the ring, decodes them together, starts their way to the host.

It owns the codec state of this engine's slots; the decoder's weights belong to the codec, which all models share.
When a chunk is due is decided elsewhere.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.codec import FRAME_SAMPLES, Codec
from gpu_worker.engines.qwen.codec.decoder_state import Snapshot
from gpu_worker.engines.qwen.model.slot_state import RING_FRAMES
from gpu_worker.engines.qwen.runtime.captured_buckets import (
    BATCH_SIZES,
    BucketedFunction,
    CapturedBuckets,
    Inputs,
    padded,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.runtime.transfers import HostCopy, to_device
from gpu_worker.engines.qwen.sequence import LONGEST_CHUNK, SCHEDULE, RunningJob

CHUNKS: Final = sorted(set(SCHEDULE))
"""Chunk lengths that graphs are captured for; the rest of an utterance may be any other."""

_PEAK: Final = 32767


class Vocoder:
    """Decodes chunks of several slots in one call."""

    def __init__(self, codec: Codec, ring: Tensor, slots: int, streams: CudaStreams) -> None:
        """ring: int64 [slots or more, RING_FRAMES, groups], where frames arrive."""
        self._codec = codec
        self._ring = ring
        self._cuda = ring.is_cuda
        self.state = codec.new_state(slots, max_chunk=LONGEST_CHUNK)
        self._streams = streams
        self._stream = streams.codec if self._cuda else None
        self._begun: torch.cuda.Event | None = None
        self._batch_sizes = [size for size in BATCH_SIZES if size <= smallest_bucket(slots, BATCH_SIZES)]
        self._buckets = CapturedBuckets()

    def fence(self) -> None:
        """Before each frame: it waits for the decodes that began before the frame ahead of it.

        A frame overwrites the codes of RING_FRAMES frames ago, which a slow decode may still have to read;
        waiting for the latest decodes as well would take turns where the two streams should run side by side.
        """
        if self._stream is None:
            return
        if self._begun is not None:
            torch.cuda.current_stream().wait_event(self._begun)
        self._begun = self._stream.record_event()

    def begin(self, slot: int, primed: Snapshot | None) -> None:
        """A new utterance in `slot`, as if the codec had already spoken what `primed` heard."""
        with torch.cuda.stream(self._stream):
            self.state.reset(slot)
            if primed is not None:
                self.state.restore(slot, primed)

    def groups(self, due: Sequence[RunningJob]) -> list[list[RunningJob]]:
        """Chunks that may be decoded together: those of one length.

        On CPU, the rest of an utterance (CHUNKS has no such length) is decoded alone: threads that share a product
        may cut its rows where some of them round differently (seen at 3 frames, with 2 threads).
        """
        groups: dict[tuple[int, int], list[RunningJob]] = {}
        for speaking in due:
            alone = not self._cuda and speaking.pending not in CHUNKS
            groups.setdefault((speaking.pending, speaking.slot if alone else -1), []).append(speaking)
        return list(groups.values())

    def decode(self, group: list[RunningJob]) -> HostCopy[list[RunningJob]]:
        """The pending frames of a group, all of them as many, as int16 PCM [len(group), samples] on its way.

        Changes the slots' state as a whole or, where it raises, not at all.
        """
        chunk = group[0].pending
        slots = [speaking.slot for speaking in group]
        starts = [speaking.landed - chunk for speaking in group]
        if self._stream is None:
            where, pcm = self._new_inputs(len(group), chunk)
            where.copy_(torch.tensor([slots, starts]))
            readback = HostCopy(pcm, group)
            self._decode_or_nothing(where, chunk, pcm)
            readback.start()
            return readback
        # Its frames have landed: the device is done with them, and this need not wait for the one it is making now.
        with torch.cuda.stream(self._stream):
            batch = smallest_bucket(len(group), self._batch_sizes)
            bucket = ("decode", batch, chunk)
            where, pcm = self._buckets.inputs(bucket) or self._new_inputs(batch, chunk)
            numbers = [*padded(slots, batch, self.state.scratch), *padded(starts, batch, 0)]
            where.copy_(to_device(numbers, where.device).view(2, batch), non_blocking=True)
            readback = HostCopy(pcm[: len(group)], group)
            self._buckets.run(bucket, functools.partial(self._decode_or_nothing, where, chunk, pcm))
            readback.start()
            return readback

    def prepare(self) -> None:
        """Capture graphs, largest first."""
        if not self._cuda:
            return
        decode = BucketedFunction(
            "decode",
            lambda _batch, chunk, inputs: self._decode_into(inputs[0], chunk, inputs[1]),
            self._batch_sizes,
            CHUNKS,
            self._new_inputs,
        )
        self._buckets.capture([decode], capturing=self._streams.codec_capture, warming=self._streams.transfer)

    def memory(self) -> dict[str, int]:
        """Device bytes by purpose, beside the slots' state."""
        return self._buckets.memory()

    def tensors(self) -> Iterator[Tensor]:
        """The slots' state."""
        yield from (self.state.rings, self.state.history, self.state.positions)

    def release(self) -> None:
        """Forget the graphs; `prepare` brings them back."""
        self._buckets.release()

    def _decode_or_nothing(self, where: Tensor, chunk: int, pcm: Tensor) -> None:
        before = self.state.positions.clone()
        try:
            self._decode_into(where, chunk, pcm)
        except BaseException:
            self.state.positions.copy_(before)  # all else is written at the very end, or again at the same place
            raise

    def _decode_into(self, where: Tensor, chunk: int, pcm: Tensor) -> None:
        slots, starts = where
        frames = (starts[:, None] + torch.arange(chunk, device=starts.device)) % RING_FRAMES
        waveform = self._codec.decode(self._ring[slots[:, None], frames], slots, self.state)
        pcm.copy_((waveform * _PEAK).round_())

    def _new_inputs(self, batch: int, chunk: int) -> Inputs:
        """Slots and first frames int64 [2, batch], all of them padding, and PCM int16 [batch, samples]."""
        where = torch.full((2, batch), self.state.scratch, dtype=torch.int64, device=self._ring.device)
        where[1] = 0
        return where, torch.empty(batch, chunk * FRAME_SAMPLES, dtype=torch.int16, device=self._ring.device)
