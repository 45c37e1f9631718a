"""Attention of the code predictor over the 16 positions of a frame: one kernel instead of eleven.

It norms and rotates queries and keys, writes keys and values to the frame's cache, and attends.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.kernels.agreement import difference
from gpu_worker.engines.qwen.kernels.rotation import Rope, Rotation, random_rope, random_rotation


class FrameAttention(Protocol):
    """Causal attention of one or two new tokens a row over the frame's few tokens."""

    def __call__(
        self,
        qkv: Tensor,
        rotation: tuple[Rotation, Rope] | None,
        cache: tuple[Tensor, Tensor],
        position: int,
        *,
        by_group: bool,
    ) -> Tensor:
        """`qkv`: [rows * tokens, heads + 2 * kv_heads, head_dim]; each row's heads are contiguous.

        `rotation`: None if queries and keys are normed and rotated already.
        `cache`: keys and values [rows, positions, kv_heads, head_dim], contiguous.
        `position`: that of a row's first new token. The tokens before are in the cache.
        Returns [rows * tokens, heads * head_dim], the heads as `Attention.heads_by_group` says.
        """


def frame_attention(
    qkv: Tensor,
    rotation: tuple[Rotation, Rope] | None,
    cache: tuple[Tensor, Tensor],
    position: int,
    *,
    by_group: bool,
) -> Tensor:
    """The reference. FrameCache does the same with views that it makes once, and with any attention backend."""
    rows, _, kv_heads, dim = cache[0].shape
    tokens = len(qkv) // rows
    split = qkv.split_with_sizes((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    query, key, value = split if rotation is None else rotation[0](qkv, rotation[1])
    end = position + tokens
    for cached, new in zip(cache, (key, value), strict=True):
        cached[:, position:end] = new.view(rows, tokens, kv_heads, dim)
    query = query.reshape(rows, tokens, -1, dim).transpose(1, 2)
    keys, values = (cached[:, :end].transpose(1, 2) for cached in cache)
    visible = torch.ones(tokens, end, dtype=torch.bool, device=qkv.device).tril(position)
    out = functional.scaled_dot_product_attention(query, keys, values, visible, enable_gqa=True).transpose(1, 2)
    if by_group:
        out = out.unflatten(2, (kv_heads, -1)).transpose(2, 3)
    return out.reshape(rows * tokens, -1)


def disagreement(fused: FrameAttention, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values, early and late in a frame; None if it does not.

    Backends of SDPA round weights to the dtype or keep them in float32, so a result may be off by a unit in the last
    place of the largest value.
    """
    heads, kv_heads, dim, rows = 16, 8, 128, 1
    generator = torch.Generator().manual_seed(0)
    caches = torch.zeros(2, 2, rows, 16, kv_heads, dim, dtype=dtype, device=device)
    weights = random_rotation((heads, kv_heads, dim), generator, caches)
    for position, tokens, rotates in ((0, 2, True), (2, 1, False), (15, 1, True)):
        qkv = torch.randn(rows * tokens, heads + 2 * kv_heads, dim, generator=generator).to(device, dtype)
        rope = random_rope(rows * tokens, dim, generator, qkv)
        rotation = (weights, rope) if rotates else None
        ours, reference = (
            function(qkv, rotation, (cache[0], cache[1]), position, by_group=True)
            for function, cache in zip((fused, frame_attention), caches, strict=True)
        )
        if problem := difference(ours, reference, scale=float(caches[1, 1].abs().max())):
            return problem
    return difference(caches[0], caches[1], share=0.02, scale=4.0)
