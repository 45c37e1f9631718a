"""Codes to PCM: gathers due chunks from the ring buffer, decodes them together, and starts their copies to the host.

The Vocoder owns the codec streams of this engine's slots. The weights belong to the codec, which all models share.
sequence.py decides when a chunk is due.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.chunk_schedule import CHUNK_LENGTHS, MAX_CHUNK_FRAMES
from gpu_worker.engines.qwen.codec import Codec, StreamSnapshot
from gpu_worker.engines.qwen.model.slot_state import RING_FRAMES
from gpu_worker.engines.qwen.parking import rows_to_device, rows_to_host
from gpu_worker.engines.qwen.runtime.captured_buckets import (
    DECODE_BATCH_SIZES,
    CapturedBuckets,
    largest_first,
    padded,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from gpu_worker.engines.qwen.runtime.transfers import HostCopy, to_device
from gpu_worker.engines.qwen.sequence import RunningJob
from shared.pcm import FRAME_SAMPLES

_PEAK: Final = 32767


class Vocoder:
    """Decodes chunks of several slots in one call."""

    def __init__(self, codec: Codec, ring_buffer: Tensor, slots: int, streams: CudaStreams) -> None:
        """`ring_buffer`: int64 [slots or more, RING_FRAMES, groups], the codes of each slot's last frames."""
        self._codec = codec
        self._ring_buffer = ring_buffer
        self._cuda = ring_buffer.is_cuda
        self.state = codec.new_state(slots, max_chunk=MAX_CHUNK_FRAMES)
        self._streams = streams
        self._stream = streams.codec if self._cuda else None
        self._issued_decodes: torch.cuda.Event | None = None
        largest = smallest_bucket(slots, DECODE_BATCH_SIZES)
        self._batch_sizes = [size for size in DECODE_BATCH_SIZES if size <= largest]
        self._buckets = CapturedBuckets()

    def wait_for_older_decodes(self) -> None:
        """Make the next frame wait for the decodes that were issued before the previous frame. Call before each frame.

        Frame n overwrites the codes of frame n - RING_FRAMES, which a slow decode may still have to read.
        Waiting for newer decodes would make the two streams run one after the other.
        """
        if self._stream is None:
            return
        if self._issued_decodes is not None:
            torch.cuda.current_stream().wait_event(self._issued_decodes)
        self._issued_decodes = self._stream.record_event()

    def begin(self, slot: int, primed: StreamSnapshot | None) -> None:
        """Begin the codec stream of a new utterance in `slot`, from the state `primed` if it is given."""
        with torch.cuda.stream(self._stream):
            self.state.reset(slot)
            if primed is not None:
                self.state.restore(slot, primed)

    def wait_for_decodes(self) -> None:
        """Make all later work on the slots wait for the decodes issued so far. Call before a running job is parked.

        Its slot's next job overwrites the codes that such a decode may still have to read.
        """
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def park(self, slot: int) -> list[Tensor]:
        """Begin to copy the slot's codec stream to host memory, behind the decodes issued so far."""
        with torch.cuda.stream(self._stream):
            return rows_to_host(self.state.rows(slot))

    def unpark(self, slot: int, blocks: Sequence[Tensor]) -> None:
        """Begin to copy a parked codec stream into `slot`, whose codes are being copied there, too.

        Later decodes wait for the codes.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            rows_to_device(blocks, self.state.rows(slot))

    def decode(self, group: list[RunningJob]) -> HostCopy[list[RunningJob]]:
        """Decode the next chunk of each member of a group, all of one length. Returns the copy of the PCM to the host.

        The PCM is int16 [len(group), samples]. If `decode` raises, the slots' codec streams are as before the call.
        """
        chunk = group[0].next_chunk
        slots = [sequence.slot for sequence in group]
        starts = [sequence.frames_ready - sequence.pending_frames for sequence in group]
        if self._stream is None:
            where, pcm = self._new_inputs(len(group), chunk)
            where.copy_(torch.tensor([slots, starts]))
            host_copy = HostCopy(pcm, group)
            self._decode_or_restore(where, chunk, pcm)
            host_copy.start()
            return host_copy
        # The frames are ready, so the device has finished them: decoding need not wait for the frame that it makes now.
        with torch.cuda.stream(self._stream):
            batch = smallest_bucket(len(group), self._batch_sizes)
            bucket = ("decode", batch, chunk)
            where, pcm = self._buckets.inputs.get(bucket) or self._new_inputs(batch, chunk)
            numbers = [*padded(slots, batch, self.state.scratch), *padded(starts, batch, 0)]
            where.copy_(to_device(numbers, where.device).view(2, batch), non_blocking=True)
            host_copy = HostCopy(pcm[: len(group)], group)
            self._buckets.run(bucket, functools.partial(self._decode_or_restore, where, chunk, pcm))
            host_copy.start()
            return host_copy

    def prepare(self) -> None:
        """Capture the graphs on CUDA, the largest first."""
        if not self._cuda:
            return
        functions: dict[Key, Callable[[], None]] = {}
        for batch, chunk in largest_first(self._batch_sizes, CHUNK_LENGTHS):
            where, pcm = self._buckets.inputs["decode", batch, chunk] = self._new_inputs(batch, chunk)
            functions["decode", batch, chunk] = functools.partial(self._decode_into, where, chunk, pcm)
        streams = self._streams
        self._buckets.capture(
            functions, capturing=streams.codec_capture, warming=streams.transfer, pool=streams.codec_pool
        )

    def memory(self) -> dict[str, int]:
        """Device bytes by purpose, without the codec streams."""
        return self._buckets.memory()

    def tensors(self) -> Iterator[Tensor]:
        """The tensors of the codec streams."""
        yield from self.state.tensors()

    def release(self) -> None:
        """Drop the graphs and their inputs; `prepare` makes them again."""
        self._buckets.release()

    def _decode_or_restore(self, where: Tensor, chunk: int, pcm: Tensor) -> None:
        before = self.state.positions.clone()
        try:
            self._decode_into(where, chunk, pcm)
        except BaseException:
            # The codec writes the history last. It writes the key-value rings again at the same place.
            self.state.positions.copy_(before)
            raise

    def _decode_into(self, where: Tensor, chunk: int, pcm: Tensor) -> None:
        slots, starts = where
        frames = (starts[:, None] + torch.arange(chunk, device=starts.device)) % RING_FRAMES
        waveform = self._codec.decode(self._ring_buffer[slots[:, None], frames], slots, self.state)
        # In place: the history of the streams is written, so from here on nothing may run out of memory.
        pcm.copy_(waveform.mul_(_PEAK).round_())

    def _new_inputs(self, batch: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Slots and first frames int64 [2, batch], all of them padding, and PCM int16 [batch, samples]."""
        where = torch.full((2, batch), self.state.scratch, dtype=torch.int64, device=self._ring_buffer.device)
        where[1] = 0
        return where, torch.empty(batch, chunk * FRAME_SAMPLES, dtype=torch.int16, device=self._ring_buffer.device)
