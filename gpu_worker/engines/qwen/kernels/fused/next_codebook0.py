"""Codebook 0 of the next frames in one kernel, one program a row: penalty, sampling, and what becomes of the slot."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.sampling import COPIED, sample_row
from gpu_worker.engines.qwen.kernels.slot_tensors import SlotTensors

WARPS: Final = 8
"""A row of 2049 scores takes a block of 4096: 16 a thread."""


@triton.jit(do_not_specialize=["frames"])
def _kernel(
    logits,
    logits_stride,
    hidden,
    sampled,
    prompts,
    uniform,
    first_uniform,
    temperature,
    rank,
    top_p,
    penalty,
    seen,
    active,
    next_codebook0,
    frame,
    kept_hidden,
    frames,
    groups: tl.constexpr,
    outputs: tl.constexpr,
    min_frames: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    copied: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    valid = columns < outputs
    scores = tl.load(logits + row * logits_stride + columns, mask=valid, other=0.0).to(tl.float32)
    if prompts is not None:
        slot = tl.load(prompts + row)
        seen_before = tl.load(seen + slot * outputs + columns, mask=valid, other=0) != 0
        level = tl.load(first_uniform + slot)
        next_frame = tl.zeros([], tl.int64)
        goes_on = next_frame == 0
    else:
        slot = row
        code = tl.load(next_codebook0 + slot)
        seen_before = (tl.load(seen + slot * outputs + columns, mask=valid, other=0) != 0) | (columns == code)
        tl.store(seen + slot * outputs + code, True)
        number = tl.load(frame + slot)
        level = tl.load(uniform + (slot * frames + number) * groups + groups - 1)
        next_frame = number + 1
        goes_on = tl.load(active + slot) != 0
    factor = tl.load(penalty + slot)
    scores = tl.where(seen_before, tl.where(scores < 0.0, scores * factor, tl.div_rn(scores, factor)), scores)
    scores = tl.where((columns == outputs - 1) & (next_frame < min_frames), float("-inf"), scores)
    top_k = (tl.load(rank + slot) + 1).to(tl.int32)
    code = sample_row(scores, valid, columns, level, tl.load(temperature + slot), top_k, tl.load(top_p + slot), 0).to(
        tl.int64
    )
    tl.store(sampled + row, code)
    if goes_on:
        tl.store(next_codebook0 + slot, code)
        if prompts is None:
            tl.store(frame + slot, next_frame)
        for start in tl.static_range(0, width, copied):
            part = start + tl.arange(0, copied)
            values = tl.load(hidden + row * width + part, mask=part < width)
            tl.store(kept_hidden + slot * width + part, values, mask=part < width)


def next_codebook0(
    slots: SlotTensors,
    logits: Tensor,
    hidden: Tensor,
    prompts: Tensor | None,
    *,
    min_frames: int,
    full_vocab: bool,
) -> Tensor:
    """See the parent's `next_codebook0`."""
    del full_vocab  # no top_k costs more than another
    rows, outputs = logits.shape
    sampled = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _kernel[rows,](
        logits,
        logits.stride(0),
        hidden,
        sampled,
        prompts,
        slots.uniform,
        slots.first_uniform,
        slots.temperature,
        slots.rank,
        slots.top_p,
        slots.penalty,
        slots.seen,
        slots.active,
        slots.next_codebook0,
        slots.frame,
        slots.hidden,
        slots.uniform.shape[1],
        slots.uniform.shape[2],
        outputs,
        min_frames,
        hidden.shape[1],
        triton.next_power_of_2(outputs),
        COPIED,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return sampled
