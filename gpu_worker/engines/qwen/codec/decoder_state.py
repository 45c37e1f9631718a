"""The state of decoder streams between chunks: last keys and values, last inputs of the convolutions, and position.

One DecoderState holds all slots of one engine in static tensors, so that kernels can be captured into CUDA graphs.
This module computes nothing.
"""

import math
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape
from gpu_worker.engines.qwen.runtime.lazy_zeros import lazy_zeros


class StreamSnapshot(msgspec.Struct, frozen=True):
    """A copy of one slot's state. It fits into any slot of any DecoderState of the same codec and `max_chunk`."""

    kv_rings: Tensor
    history: Tensor
    positions: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All tensors."""
        yield from (self.kv_rings, self.history, self.positions)


class DecoderState:
    """The state of `slots` streams. One more slot, `scratch`, serves the rows that pad a batch.

    `kv_rings` [layers, slots + 1, rows, 2, heads, head_dim]: rotated keys, and values, of the last frames.
    `history` [slots + 1, history_size]: the last inputs of each convolution, in order of execution.
    `positions` int64 [slots + 1]: frames decoded so far.
    """

    def __init__(
        self,
        shape: DecoderShape,
        history_size: int,
        *,
        slots: int,
        max_chunk: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows = _ring_rows(shape, max_chunk)
        heads = (2, shape.num_key_value_heads, shape.head_dim)
        self.slots = slots
        self.scratch = slots
        self.max_chunk = max_chunk
        like = torch.empty(0, dtype=dtype, device=device)
        self.kv_rings = lazy_zeros(like, shape.num_hidden_layers, slots + 1, rows, *heads)
        self.history = torch.zeros((slots + 1, history_size), dtype=dtype, device=device)
        self.positions = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def reset(self, slot: int) -> None:
        """Begin a new stream in `slot`."""
        self.kv_rings[:, slot].zero_()
        self.history[slot].zero_()
        self.positions[slot].zero_()

    def rows(self, slot: int) -> list[Tensor]:
        """Contiguous views of the slot's state."""
        return [*self.kv_rings[:, slot], self.history[slot], self.positions[slot : slot + 1]]

    def snapshot(self, slot: int) -> StreamSnapshot:
        """A copy of the slot's state."""
        return StreamSnapshot(self.kv_rings[:, slot].clone(), self.history[slot].clone(), self.positions[slot].clone())

    def restore(self, slot: int, snapshot: StreamSnapshot) -> None:
        """Continue the stream of the snapshot in `slot`."""
        self.kv_rings[:, slot].copy_(snapshot.kv_rings)
        self.history[slot].copy_(snapshot.history)
        self.positions[slot].copy_(snapshot.positions)

    def tensors(self) -> Iterator[Tensor]:
        """All state tensors."""
        yield from (self.kv_rings, self.history, self.positions)


def kv_ring_bytes(shape: DecoderShape, max_chunk: int) -> int:
    """Bytes of the keys and values of one stream in float32, which are nearly all of its state."""
    heads = 2 * shape.num_key_value_heads * shape.head_dim
    return shape.num_hidden_layers * _ring_rows(shape, max_chunk) * heads * torch.float32.itemsize


def _ring_rows(shape: DecoderShape, max_chunk: int) -> int:
    # A multiple of 8: fused attention kernels need masks with aligned rows.
    return 8 * math.ceil((shape.sliding_window - 1 + max_chunk) / 8)
