"""A product with quantised weights in one kernel: weights are widened in registers, on their way to the tensor cores.

Every output is a sum over all inputs in ascending order, by tensor core instructions of one shape. Tiles differ in how
many outputs they have, never in that order; no sum is split. So a row's bits depend neither on the tile nor on company.
"""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded

FEW_OUTPUTS: Final = 4096
FEW_ROWS: Final = 16
"""Up to here one block of rows: the least that tensor cores take. Above, blocks of twice as many.

With 64 rows or more, Hopper and Blackwell would use other instructions, whose sums have another order.
"""

INPUT_BLOCK: Final = 128
STAGES: Final = 4
"""Tiles of a weight that are on their way from memory: 8 to 16 KB for each program."""


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x,
    weight,
    scale,
    bias,
    out,
    rows,
    outputs,
    inputs: tl.constexpr,
    row_block: tl.constexpr,
    output_block: tl.constexpr,
    input_block: tl.constexpr,
):
    row = tl.program_id(0) * row_block + tl.arange(0, row_block)
    output = tl.program_id(1) * output_block + tl.arange(0, output_block)
    column = tl.arange(0, input_block)
    dtype: tl.constexpr = out.dtype.element_ty
    there, exists = row < rows, output < outputs
    activations = x + row[:, None] * inputs + column[None, :]
    weights = weight + output[None, :] * inputs + column[:, None]
    total = tl.zeros([row_block, output_block], tl.float32)
    for start in range(0, inputs, input_block):
        if inputs % input_block == 0:
            left = tl.load(activations + start, mask=there[:, None], other=0.0)
            right = tl.load(weights + start, mask=exists[None, :], other=0.0)
        else:
            inside = start + column < inputs
            left = tl.load(activations + start, mask=there[:, None] & inside[None, :], other=0.0)
            right = tl.load(weights + start, mask=inside[:, None] & exists[None, :], other=0.0)
        total = tl.dot(left, right.to(tl.float32).to(dtype), total)  # both dtypes of weights fit into 16 bits
    total = total * tl.load(scale + output, mask=exists, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)[None, :]
    places = out + row[:, None] * outputs + output[None, :]
    tl.store(places, rounded(total, dtype).to(dtype), mask=there[:, None] & exists[None, :])


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """See the parent's QuantizedLinear. `x` is contiguous."""
    rows, inputs = x.shape
    outputs = len(weight)
    out = x.new_empty(rows, outputs)
    row_block, output_block = tile(rows, outputs)
    _kernel[triton.cdiv(rows, row_block), triton.cdiv(outputs, output_block)](
        x,
        weight,
        scale,
        bias,
        out,
        rows,
        outputs,
        inputs,
        row_block,
        output_block,
        INPUT_BLOCK,
        num_stages=STAGES,
        num_warps=warps(output_block),
        enable_fp_fusion=False,
    )
    return out


def tile(rows: int, outputs: int) -> tuple[int, int]:
    """Rows and outputs of a program. Few outputs make small tiles, so that there is a program for each multiprocessor.

    Many rows make larger ones: every program reads all inputs of its rows.
    """
    if rows <= FEW_ROWS:
        return FEW_ROWS, 32 if outputs > FEW_OUTPUTS else 16
    return 2 * FEW_ROWS, 64 if outputs > FEW_OUTPUTS else 32


def warps(output_block: int) -> int:
    """Warps of a program: each has 8 outputs at least, which is what the instructions take."""
    return min(4, output_block // 8)
