"""Rounding within Triton kernels, to the same bits on a GPU and in Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` (float32) rounded to `dtype`, as float32.

    To bfloat16 by hand, to the nearest and ties to even: the interpreter's cast was seen to round otherwise.
    A NaN stays one.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, nearest.to(tl.float32, bitcast=True))  # noqa: PLR0124 -- a NaN
    return x.to(dtype).to(tl.float32)
