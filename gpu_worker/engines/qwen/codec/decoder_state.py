"""What a stream carries from chunk to chunk: keys and values of its last frames, inputs of convolutions, its position.

One DecoderState holds all slots of one engine in static tensors, so that kernels can be captured into CUDA graphs.
It computes nothing.
"""

import math
from collections.abc import Iterator

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.codec.codec_config import DecoderShape


class Snapshot(msgspec.Struct, frozen=True):
    """A copy of one slot's state, to be put into any slot of any DecoderState of the same codec and `max_chunk`."""

    rings: Tensor
    history: Tensor
    positions: Tensor

    @property
    def bytes(self) -> int:
        """Bytes it holds."""
        return sum(tensor.nbytes for tensor in (self.rings, self.history, self.positions))

    def to(self, device: torch.device | str) -> "Snapshot":
        """The same on `device`."""
        return Snapshot(self.rings.to(device), self.history.to(device), self.positions.to(device))


class DecoderState:
    """State tensors of `slots` streams, and of one slot more (`scratch`) for rows that pad a batch.

    `rings`: [layers, slots + 1, rows, 2, heads, head_dim], keys (rotated) and values of the last frames;
    `history`: [slots + 1, values], the last inputs of each convolution in order of execution;
    `positions`: int64 [slots + 1], frames decoded so far.
    """

    def __init__(
        self,
        shape: DecoderShape,
        history_values: int,
        *,
        slots: int,
        max_chunk: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Aligned to 8: fused attention kernels want masks of aligned rows.
        rows = 8 * math.ceil((shape.sliding_window - 1 + max_chunk) / 8)
        heads = (2, shape.num_key_value_heads, shape.head_dim)
        self.slots = slots
        self.scratch = slots
        self.max_chunk = max_chunk
        self.rings = torch.zeros((shape.num_hidden_layers, slots + 1, rows, *heads), dtype=dtype, device=device)
        self.history = torch.zeros((slots + 1, history_values), dtype=dtype, device=device)
        self.positions = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    @property
    def bytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def reset(self, slot: int) -> None:
        """Begin a new stream in `slot`."""
        self.rings[:, slot].zero_()
        self.history[slot].zero_()
        self.positions[slot].zero_()

    def snapshot(self, slot: int) -> Snapshot:
        """A copy of the slot's state."""
        return Snapshot(self.rings[:, slot].clone(), self.history[slot].clone(), self.positions[slot].clone())

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Continue in `slot` from where the snapshot was taken."""
        self.rings[:, slot].copy_(snapshot.rings)
        self.history[slot].copy_(snapshot.history)
        self.positions[slot].copy_(snapshot.positions)

    def tensors(self) -> Iterator[Tensor]:
        """Every state tensor."""
        yield from (self.rings, self.history, self.positions)
