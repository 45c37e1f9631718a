"""Parking: what a slot holds of a running utterance waits in host memory, and goes back into any free slot.

Owns the copies between rows and host memory. It decides nothing about jobs and slots.

On CUDA each copy runs on the stream that computes with its rows, so the order of that stream makes it exact:
a copy to the host sees the frame that was launched last, and the slot's next job writes behind the copy.
Neither direction waits for the device. torch keeps freed pinned memory for the next parked job until an engine closes.

A published 1.7B checkpoint in bfloat16 keeps 112 KiB for each token of prompt and speech, and 2.8 MiB of codec stream:
36 MiB after 300 tokens. On a CPU, with one thread, copies of these shapes took 9 ms there and 8 ms back.
A job of the tests' small checkpoint keeps 0.5 MiB after 200 frames. It parks in 0.5 ms and comes back in 0.4 ms;
a step of eight such jobs takes 10 ms. Between two utterances nothing is kept, but the job's reference to clone stays
on the device, as that of a running job.
"""

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.offload import offload_bytes, restore_bytes
from gpu_worker.engines.qwen.sequence import RunningJob

PARKING_BLOCK_BYTES: Final = 4 << 20
"""Host memory of parked rows is allocated in blocks of this size; see BLOCK_BYTES."""


class ParkedJob(msgspec.Struct, frozen=True):
    """A job without a slot. `model_rows`, `codec_rows`: host blocks of its rows; empty if its slot held nothing."""

    sequence: RunningJob
    model_rows: list[Tensor]
    codec_rows: list[Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of host memory."""
        return nbytes((*self.model_rows, *self.codec_rows))


def rows_to_host(rows: Sequence[Tensor]) -> list[Tensor]:
    """Begin to copy contiguous `rows` to host memory, pinned on CUDA. They may change as soon as this returns."""
    return offload_bytes(_as_bytes(rows), pinned=rows[0].is_cuda, block_bytes=PARKING_BLOCK_BYTES)


def rows_to_device(blocks: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
    """Begin to copy the blocks of `rows_to_host` into rows of the same shapes."""
    restore_bytes(blocks, _as_bytes(rows))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def _as_bytes(rows: Sequence[Tensor]) -> list[Tensor]:
    return [row.view(torch.uint8).view(-1) for row in rows]
