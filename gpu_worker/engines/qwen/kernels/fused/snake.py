"""Snake within Triton kernels."""

import triton
import triton.language as tl

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded


@triton.jit
def snake(x, frequency, magnitude, dtype: tl.constexpr):
    """Snake of `x`: x + sin(x * frequency)² * magnitude in float32.

    It rounds after the product, the sine, the square and the sum.
    """
    wave = rounded(tl.sin(rounded(x * frequency, dtype)), dtype)
    return rounded(x + rounded(wave * wave, dtype) * magnitude, dtype)
