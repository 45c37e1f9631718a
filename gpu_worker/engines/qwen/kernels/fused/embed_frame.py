"""The embeddings of a frame's codes and of its text, added in one kernel; the codes go into the ring buffer."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded
from gpu_worker.engines.qwen.kernels.slot_tensors import SlotTensors

BLOCK: Final = 256
"""Values of a program: a row of 2048 is shared by 8, each of which reads 17 rows."""


@triton.jit(do_not_specialize=["texts"])
def _kernel(
    codes,
    table,
    offsets,
    frame,
    trailing,
    trailing_len,
    ring_buffer,
    out,
    texts,
    groups: tl.constexpr,
    ring_frames: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < width
    dtype: tl.constexpr = out.dtype.element_ty
    number = tl.load(frame + row)
    ring = ring_buffer + (row * ring_frames + number % ring_frames) * groups
    total = tl.zeros([block], tl.float32)
    for group in tl.static_range(groups):
        code = tl.load(codes + row * groups + group)
        if tl.program_id(1) == 0:
            tl.store(ring + group, code)
        index = code + tl.load(offsets + group)
        total += tl.load(table + index * width + columns, mask=inside, other=0.0).to(tl.float32)
    place = row * texts + tl.minimum(number, tl.load(trailing_len + row))
    text = tl.load(trailing + place * width + columns, mask=inside, other=0.0).to(tl.float32)
    total = rounded(rounded(total, dtype) + text, dtype)
    tl.store(out + row * width + columns, total.to(dtype), mask=inside)


def embed_frame(slots: SlotTensors, codes: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
    """See the parent's `embed_frame`. `codes` is contiguous."""
    batch, groups = codes.shape
    width = table.shape[1]
    _kernel[batch, triton.cdiv(width, BLOCK)](
        codes,
        table,
        offsets,
        slots.frame,
        slots.trailing,
        slots.trailing_len,
        slots.ring_buffer,
        slots.talker_input,
        slots.trailing.shape[1],
        groups,
        slots.ring_buffer.shape[1],
        width,
        BLOCK,
        enable_fp_fusion=False,
    )
    return slots.talker_input[:batch]
