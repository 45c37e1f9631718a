"""A code of the code predictor in one kernel, one program a row."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.sampling import COPIED, sample_row

SAME_BITS: Final = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Low bits that are equal in all numbers of a dtype, as float32."""


@triton.jit(do_not_specialize=["temperature"])
def _kernel(
    logits,
    logits_stride,
    uniform,
    codes,
    table,
    inputs,
    temperature,
    vocabulary: tl.constexpr,
    top_k: tl.constexpr,
    width: tl.constexpr,
    shift: tl.constexpr,
    block: tl.constexpr,
    copied: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    valid = columns < vocabulary
    scores = tl.load(logits + row * logits_stride + columns, mask=valid, other=0.0).to(tl.float32)
    code = sample_row(scores, valid, columns, tl.load(uniform + row), temperature, top_k, 1.0, shift).to(tl.int64)
    tl.store(codes + row, code)
    for start in tl.static_range(0, width, copied):
        part = start + tl.arange(0, copied)
        values = tl.load(table + code * width + part, mask=part < width)
        tl.store(inputs + row * width + part, values, mask=part < width)


def sample_code(
    logits: Tensor,
    uniform: Tensor,
    table: Tensor | None,
    inputs: Tensor | None,
    *,
    top_k: int,
    temperature: float,
) -> Tensor:
    """See the parent's `sample_code`. All scores that are equal to the k-th best are kept."""
    rows, vocabulary = logits.shape
    codes = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _kernel[rows,](
        logits,
        logits.stride(0),
        uniform,
        codes,
        table,
        inputs,
        temperature,
        vocabulary,
        min(top_k, vocabulary),
        table.shape[1] if table is not None else 0,
        SAME_BITS[logits.dtype],
        triton.next_power_of_2(vocabulary),
        COPIED,
        enable_fp_fusion=False,
    )
    return codes
