"""The input of a causal convolution in one kernel: sum, Snake, history in front, and the next chunk's history."""

from typing import Final

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.bias_snake import Snake
from gpu_worker.engines.qwen.kernels.fused.rounding import rounded
from gpu_worker.engines.qwen.kernels.fused.snake import snake as snake_of

BLOCK: Final = 1024


@triton.jit(do_not_specialize=["past", "time"])
def _kernel(
    x,
    added,
    frequency,
    magnitude,
    old,
    new,
    extended,
    old_stride,
    new_stride,
    past,
    time,
    channels: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * block + tl.arange(0, block)
    front, size = past * channels, time * channels
    inside = place < front + size
    from_x = inside & (place >= front)
    dtype: tl.constexpr = extended.dtype.element_ty
    value = tl.load(x + row * size + place - front, mask=from_x, other=0.0).to(tl.float32)
    if added is not None:
        places = added + row * size + place - front
        value = rounded(value + tl.load(places, mask=from_x, other=0.0).to(tl.float32), dtype)
        tl.store(places, value.to(dtype), mask=from_x)
    if frequency is not None:
        channel = place % channels  # the history is whole rows
        factor = tl.load(frequency + channel).to(tl.float32)
        value = snake_of(value, factor, tl.load(magnitude + channel).to(tl.float32), dtype)
    before = tl.load(old + row * old_stride + place, mask=place < front, other=0.0).to(tl.float32)
    value = tl.where(from_x, value, before).to(dtype)
    tl.store(extended + row * (front + size) + place, value, mask=inside)
    tl.store(new + row * new_stride + place - size, value, mask=inside & (place >= size))


def causal_input(
    x: Tensor, added: Tensor | None, snake: Snake | None, old: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """See the parent's `causal_input`. `x` and `added` are contiguous."""
    batch, time, channels = x.shape
    past = old.shape[1]
    extended = x.new_empty(batch, past + time, channels)
    _kernel[batch, triton.cdiv((past + time) * channels, BLOCK)](
        x,
        added,
        snake.frequency if snake is not None else None,
        snake.magnitude if snake is not None else None,
        old,
        new,
        extended,
        old.stride(0),
        new.stride(0),
        past,
        time,
        channels,
        BLOCK,
        enable_fp_fusion=False,
    )
    return x if added is None else added, extended
