"""The talker's next input: the embeddings of a frame's codes and of its text, added."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference
from gpu_worker.engines.qwen.kernels.slot_tensors import SlotTensors

EmbedFrame = Callable[[SlotTensors, Tensor, Tensor, Tensor], Tensor]
"""(slots, codes int64 [batch, groups], table [codes of all groups, hidden], offsets int64 [groups]).

The codes, which are the frames of the first slots, go into `ring_buffer`. The inputs go into `talker_input`.
It returns the latter: [batch, hidden]. `offsets`: where each group begins in the table.
"""


def embed_codes(codes: Tensor, table: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of each frame's code embeddings: int64 [frames, groups] -> `dtype` [frames, hidden]."""
    rows = table.index_select(0, (codes + offsets).flatten()).to(dtype)
    return rows.view(*codes.shape, -1).sum(1)


def embed_frame(slots: SlotTensors, codes: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """The reference. It rounds after the sum of the codes, and after that of code and text."""
    part = slice(0, len(codes))
    frame = slots.frame[part]
    index = torch.arange(len(codes), device=codes.device)
    slots.ring_buffer[part].index_put_((index, frame % slots.ring_buffer.shape[1]), codes)
    text = slots.trailing[part][index, torch.minimum(frame, slots.trailing_len[part])]
    return torch.add(embed_codes(codes, table, offsets, text.dtype), text, out=slots.talker_input[part])


def disagreement(fused: EmbedFrame, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random rows; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    rows, groups, vocabulary, hidden, texts = 4, 16, 64, 2048, 5
    table = torch.randn(groups * vocabulary, hidden, generator=generator).to(device, dtype)
    offsets = vocabulary * torch.arange(groups).to(device)
    codes = torch.randint(vocabulary, (rows, groups), generator=generator).to(device)
    made = []
    for embed in (fused, embed_frame):
        slots = SimpleNamespace(
            frame=torch.tensor([0, 3, 4, 17]).to(device),
            trailing_len=torch.tensor([4, 3, 2, 0]).to(device),
            trailing=torch.randn(rows, texts, hidden, generator=generator.manual_seed(1)).to(device, dtype),
            talker_input=table.new_zeros(rows, hidden),
            ring_buffer=codes.new_zeros(rows, 16, groups),
        )
        made.append((embed(slots, codes, table, offsets), slots.ring_buffer))
    (ours, our_ring), (wanted, ring) = made
    if not torch.equal(our_ring, ring):
        return "differs from torch in the codes that it keeps"
    return difference(ours, wanted, share=0.01, scale=float(wanted.abs().max()))
