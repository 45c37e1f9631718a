"""Queries and keys normed and rotated, keys and values written to the cache, in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from gpu_worker.engines.qwen.kernels.fused.rotation import rotated_heads
from gpu_worker.engines.qwen.kernels.rotation import QKV, Rope, Rotation


@triton.jit
def _kernel(
    qkv,
    weight,
    cos,
    sin,
    slots,
    positions,
    keys,
    values,
    query,
    key,
    rope_stride,
    slot_stride,
    head_stride,
    group_stride,
    kv_heads: tl.constexpr,
    groups: tl.constexpr,
    dim: tl.constexpr,
    group_block: tl.constexpr,
    block: tl.constexpr,
    eps: tl.constexpr,
):
    """A program for each row and KV head: its key, its value, and the queries that read them."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dtype: tl.constexpr = query.dtype.element_ty
    column = tl.arange(0, block)[None, :]
    across = column < dim
    group = tl.arange(0, group_block)[:, None]
    there = group < groups
    start = qkv + row * (groups + 2) * kv_heads * dim
    cos += row * rope_stride
    sin += row * rope_stride

    number = (head * groups + group) * dim
    rotated = rotated_heads(start + number, weight + number, cos, sin, there, dim, block, eps)
    place = row * groups * kv_heads * dim + head * head_stride + group * group_stride + column
    tl.store(query + place, rotated.to(dtype), mask=there & across)

    number = (groups * kv_heads + head + tl.arange(0, 1)[:, None]) * dim
    rotated = rotated_heads(start + number, weight + number, cos, sin, number >= 0, dim, block, eps)
    tl.store(key + (row * kv_heads + head) * dim + column, rotated.to(dtype), mask=across)
    place = tl.load(slots + row) * slot_stride + (tl.load(positions + row) * kv_heads + head) * dim + column
    tl.store(keys + place, rotated.to(dtype), mask=across)
    value = tl.load(start + number + kv_heads * dim + column, mask=across)
    tl.store(values + place, value, mask=across)


def rotate_and_cache(
    qkv: Tensor,
    rotation: Rotation,
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    *,
    by_group: bool,
) -> QKV:
    """See the parent's RotateAndCache."""
    (cos, sin), (keys, values) = rope, cache
    kv_heads, dim = keys.shape[2:]
    rows, groups = len(qkv), rotation.heads // kv_heads
    order = (rows, groups, kv_heads, dim) if by_group else (rows, kv_heads, groups, dim)
    query, key = qkv.new_empty(order), qkv.new_empty(rows, kv_heads, dim)
    if by_group:
        query = query.transpose(1, 2)
    _kernel[rows, kv_heads](
        qkv,
        rotation.norm.plain_weight,
        cos,
        sin,
        *places,
        keys,
        values,
        query,
        key,
        cos.stride(0) if len(cos) > 1 else 0,
        keys.stride(0),
        query.stride(1),
        query.stride(2),
        kv_heads,
        groups,
        dim,
        triton.next_power_of_2(groups),
        triton.next_power_of_2(dim),
        rotation.norm.eps,
        enable_fp_fusion=False,
    )
    return query, key, qkv[:, rotation.heads + kv_heads :]
