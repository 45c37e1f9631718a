"""The norm and the rotation of heads within Triton kernels."""

import triton
import triton.language as tl

from gpu_worker.engines.qwen.kernels.fused.rounding import rounded


@triton.jit
def rotated_heads(heads, weight, cos, sin, inside, dim: tl.constexpr, block: tl.constexpr, eps: tl.constexpr):
    """Heads normed and rotated, float32 [heads, block], rounded to their dtype wherever torch rounds them.

    `heads`, `weight`, `cos`, `sin`: pointers to the first value of each head or of its factors, [heads, 1].
    `cos` and `sin` may be one pointer for all.
    `inside`: which of the heads exist, bool [heads, 1].
    """
    dtype: tl.constexpr = heads.dtype.element_ty
    column = tl.arange(0, block)[None, :]
    inside = inside & (column < dim)
    rolled = (column + dim // 2) % dim
    x = tl.load(heads + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(heads + rolled, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]
    x = rounded(x * scale, dtype) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y = rounded(y * scale, dtype) * tl.load(weight + rolled, mask=inside, other=0.0).to(tl.float32)
    x = rounded(x, dtype) * tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    y = rounded(y, dtype) * tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    return rounded(rounded(x, dtype) + rounded(y, dtype), dtype)
