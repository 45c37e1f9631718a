"""Attention of the code predictor in one kernel, from the projection's output to the heads' results."""

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rotation import rotated_heads
from gpu_worker.engines.qwen.kernels.fused.rounding import rounded
from gpu_worker.engines.qwen.kernels.rotation import Rope, Rotation


@triton.jit(do_not_specialize=["position"])
def _kernel(
    qkv,
    weight,
    cos,
    sin,
    keys,
    values,
    out,
    position,
    qkv_stride,
    rope_stride,
    head_stride,
    group_stride,
    rotate: tl.constexpr,
    tokens: tl.constexpr,
    positions: tl.constexpr,
    kv_heads: tl.constexpr,
    groups: tl.constexpr,
    dim: tl.constexpr,
    query_block: tl.constexpr,
    length_block: tl.constexpr,
    block: tl.constexpr,
    eps: tl.constexpr,
    scale: tl.constexpr,
):
    """A program for each row and KV head. The new keys and values are not read back from the cache."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    column = tl.arange(0, block)[None, :]
    across = column < dim
    first = row * tokens

    # The queries of all new tokens, and the new keys and values.
    query_number = tl.arange(0, query_block)[:, None]
    asked = query_number < tokens * groups
    query_token, group = query_number // groups, query_number % groups
    query_head = head * groups + group
    token = tl.arange(0, tokens)[:, None]
    key_head = groups * kv_heads + head
    queries = qkv + (first + query_token) * qkv_stride + query_head * dim
    new = qkv + (first + token) * qkv_stride + key_head * dim
    if rotate:
        angles = (first + query_token) * rope_stride
        query = rotated_heads(queries, weight + query_head * dim, cos + angles, sin + angles, asked, dim, block, eps)
        angles = (first + token) * rope_stride
        factors = weight + key_head * dim + 0 * token
        key = rotated_heads(new, factors, cos + angles, sin + angles, token < tokens, dim, block, eps)
    else:
        query = tl.load(queries + column, mask=asked & across, other=0.0).to(tl.float32)
        key = tl.load(new + column, mask=across, other=0.0).to(tl.float32)
    value = tl.load(new + kv_heads * dim + column, mask=across, other=0.0)
    cache_row = (row * positions * kv_heads + head) * dim
    place = cache_row + (position + token) * kv_heads * dim + column
    tl.store(keys + place, key.to(dtype), mask=across)
    tl.store(values + place, value, mask=across)

    # Softmax over the cached tokens and the new ones.
    cached = tl.arange(0, length_block)[:, None]
    place = cache_row + cached * kv_heads * dim + column
    known = (cached < position) & across
    old_key = tl.load(keys + place, mask=known, other=0.0).to(tl.float32)
    old_value = tl.load(values + place, mask=known, other=0.0).to(tl.float32)
    old = tl.sum(query[:, None, :] * old_key[None, :, :], 2) * scale
    old = tl.where(tl.arange(0, length_block)[None, :] < position, old, float("-inf"))
    recent = tl.sum(query[:, None, :] * key[None, :, :], 2) * scale
    recent = tl.where(tl.arange(0, tokens)[None, :] <= query_token, recent, float("-inf"))
    largest = tl.maximum(tl.max(old, 1), tl.max(recent, 1))[:, None]
    old, recent = tl.exp(old - largest), tl.exp(recent - largest)
    total = (tl.sum(old, 1) + tl.sum(recent, 1))[:, None]
    result = tl.sum(old[:, :, None] * old_value[None, :, :], 1)
    result += tl.sum(recent[:, :, None] * value.to(tl.float32)[None, :, :], 1)
    where = out + (first + query_token) * groups * kv_heads * dim + head * head_stride + group * group_stride + column
    tl.store(where, rounded(result / total, dtype).to(dtype), mask=asked & across)


def frame_attention(
    qkv: Tensor,
    rotation: tuple[Rotation, Rope] | None,
    cache: tuple[Tensor, Tensor],
    position: int,
    *,
    by_group: bool,
) -> Tensor:
    """See the parent's FrameAttention."""
    keys, values = cache
    rows, positions, kv_heads, dim = keys.shape
    tokens, groups = len(qkv) // rows, qkv.shape[1] // kv_heads - 2
    # Without a rotation, these are not read.
    weight: Tensor | None = qkv
    cos = sin = qkv
    rope_stride, eps = 0, 0.0
    if rotation is not None:
        turn, (cos, sin) = rotation
        weight, eps = turn.norm.plain_weight, turn.norm.eps
        rope_stride = cos.stride(0) if len(cos) > 1 else 0
    out = qkv.new_empty(rows * tokens, groups * kv_heads * dim)
    _kernel[rows, kv_heads](
        qkv,
        weight,
        cos,
        sin,
        keys,
        values,
        out,
        position,
        qkv.stride(0),
        rope_stride,
        dim if by_group else groups * dim,
        kv_heads * dim if by_group else dim,
        rotation is not None,
        tokens,
        positions,
        kv_heads,
        groups,
        dim,
        triton.next_power_of_2(tokens * groups),
        triton.next_power_of_2(positions),
        triton.next_power_of_2(dim),
        eps,
        dim**-0.5,
        enable_fp_fusion=False,
    )
    return out
