"""Queries and keys normed and rotated, keys and values written to the cache: one kernel instead of eight."""

from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference
from gpu_worker.engines.qwen.kernels.rotation import QKV, Rope, Rotation, random_rope, random_rotation


class RotateAndCache(Protocol):
    """Norms and rotates queries and keys, and writes keys and values to the cache."""

    def __call__(
        self,
        qkv: Tensor,
        rotation: Rotation,
        rope: Rope,
        cache: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor],
        *,
        by_group: bool,
    ) -> QKV:
        """`qkv`: [rows, heads + 2 * kv_heads, head_dim], contiguous.

        `cache`: keys and values [slots, positions, kv_heads, head_dim].
        `places`: slot and position of each row, int64 [rows], contiguous. Of rows with the same place, any may win.
        Returns queries [rows, kv_heads, heads of one KV head, head_dim], keys and values [rows, kv_heads, head_dim].
        `by_group`: in memory, queries should have the first head of every KV head in front, then the second.
        """


def rotate_and_cache(
    qkv: Tensor,
    rotation: Rotation,
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    *,
    by_group: bool,
) -> QKV:
    """The reference. It rounds where `Rotation` does. It leaves the order in memory to its reader."""
    del by_group
    query, key, value = rotation(qkv, rope)
    keys, values = cache
    keys.index_put_(places, key)
    values.index_put_(places, value)
    return query.view(query.shape[0], rotation.kv_heads, -1, query.shape[2]), key, value


def disagreement(fused: RotateAndCache, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference for random values of the published shape; None if it does not."""
    heads, kv_heads, dim = 16, 8, 128
    generator = torch.Generator().manual_seed(0)
    qkv = (3 * torch.randn(2, heads + 2 * kv_heads, dim, generator=generator)).to(device, dtype)
    rotation = random_rotation((heads, kv_heads, dim), generator, qkv)
    rope = random_rope(2, dim, generator, qkv)
    places = torch.tensor([3, 0], device=device), torch.tensor([1, 6], device=device)
    for by_group in (False, True):
        results = []
        for function in (fused, rotate_and_cache):
            cache = torch.zeros(2, 5, 7, kv_heads, dim, dtype=dtype, device=device)
            written = function(qkv, rotation, rope, (cache[0], cache[1]), places, by_group=by_group)
            results.append((*written, cache))
        for ours, reference in zip(*results, strict=True):
            if problem := difference(ours, reference, share=0.02, scale=4.0):
                return problem
    return None
