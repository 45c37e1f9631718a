"""A bias and Snake in one kernel, in place."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.bias_snake import Snake
from gpu_worker.engines.qwen.kernels.fused.rounding import rounded
from gpu_worker.engines.qwen.kernels.fused.snake import snake as snake_of

BLOCK: Final = 1024


@triton.jit(do_not_specialize=["rows"])
def _kernel(x, bias, frequency, magnitude, rows, channels: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < rows * channels
    channel = place % channels
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value = rounded(value + tl.load(bias + channel).to(tl.float32), dtype)
    factor = tl.load(frequency + channel).to(tl.float32)
    value = snake_of(value, factor, tl.load(magnitude + channel).to(tl.float32), dtype)
    tl.store(x + place, value.to(dtype), mask=inside)


def bias_snake(x: Tensor, bias: Tensor | None, snake: Snake) -> Tensor:
    """See the parent's `bias_snake`."""
    x = x.contiguous()
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _kernel[grid](
        x,
        bias,
        snake.frequency,
        snake.magnitude,
        x.shape[0] * x.shape[1],
        snake.channels,
        BLOCK,
        enable_fp_fusion=False,
    )
    return x
