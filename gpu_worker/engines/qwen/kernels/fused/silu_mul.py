"""silu(gate) * up in one kernel."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded

BLOCK: Final = 1024


@triton.jit
def _kernel(gate_up, out, inner: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < inner
    dtype: tl.constexpr = out.dtype.element_ty
    gates = gate_up + row * 2 * inner + columns
    gate = tl.load(gates, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gates + inner, mask=inside, other=0.0).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), dtype)
    tl.store(out + row * inner + columns, rounded(silu * up, dtype).to(dtype), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See the parent's `silu_mul`. `gate_up` is contiguous."""
    rows, width = gate_up.shape
    inner = width // 2
    out = gate_up.new_empty(rows, inner)
    _kernel[rows, triton.cdiv(inner, BLOCK)](gate_up, out, inner, BLOCK, enable_fp_fusion=False)
    return out
