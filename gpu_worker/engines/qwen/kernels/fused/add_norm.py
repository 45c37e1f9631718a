"""The residual sum and the norm behind it in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded
from gpu_worker.engines.qwen.kernels.norm import Norm


@triton.jit
def _kernel(x, y, weight, total, normed, x_stride, width: tl.constexpr, block: tl.constexpr, eps: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    dtype: tl.constexpr = total.dtype.element_ty
    left = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(y + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sums = rounded(left + right, dtype)
    tl.store(total + row * width + columns, sums.to(dtype), mask=inside)
    unit = rounded(sums * tl.rsqrt(tl.sum(sums * sums, 0) / width + eps), dtype)
    factors = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + columns, rounded(unit * factors, dtype).to(dtype), mask=inside)


def add_norm(x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """See the parent's `add_norm`. The rows of `x` may lie apart; `y` is contiguous."""
    rows, width = y.shape
    total, normed = y.new_empty(rows, width), y.new_empty(rows, width)
    block = triton.next_power_of_2(width)
    _kernel[(rows,)](
        x, y, norm.plain_weight, total, normed, x.stride(0), width, block, norm.eps, enable_fp_fusion=False
    )
    return total, normed
