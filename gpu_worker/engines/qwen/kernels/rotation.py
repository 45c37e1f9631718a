"""The norm of queries and keys, and their rotation (RoPE). The fused kernels of attention do it on the way."""

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

Rope = tuple[Tensor, Tensor]
"""(cos, sin), each [rows, 1, head_dim], or [1, 1, head_dim] for all rows. The first half of the sines is negative."""

QKV = tuple[Tensor, Tensor, Tensor]
"""Queries [rows, heads, head_dim], keys and values [rows, kv_heads, head_dim] of one layer."""


class Rotation(TensorHolder):
    """The norm of each head of queries and keys, and their rotation."""

    def __init__(self, query_weight: Tensor, key_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
        """The weights are [head_dim]: one of all heads of queries, one of all heads of keys."""
        self.heads, self.kv_heads = heads, kv_heads
        self._half = query_weight.shape[0] // 2
        self.norm = Norm(torch.cat((query_weight.expand(heads, -1), key_weight.expand(kv_heads, -1))), eps)

    def __call__(self, qkv: Tensor, rope: Rope) -> QKV:
        """`qkv`: [rows, heads + 2 * kv_heads, head_dim], queries first, values last."""
        cos, sin = rope
        sizes = (self.heads + self.kv_heads, self.kv_heads)
        qk, value = qkv.split_with_sizes(sizes, 1)  # half the time of split
        qk = self.norm.of_part(qk, qkv, sizes)
        rotated = qk.roll(self._half, -1)
        # In one kernel where that rounds no coarser than the official two.
        qk = torch.addcmul(qk * cos, rotated, sin) if qk.dtype == torch.float32 else qk * cos + rotated * sin
        query, key = qk.split_with_sizes((self.heads, self.kv_heads), 1)
        return query, key, value


def random_rotation(shape: tuple[int, int, int], generator: torch.Generator, like: Tensor) -> Rotation:
    """A rotation with random weights, for comparisons. `shape`: heads, KV heads, head_dim. `like`: device and dtype."""
    heads, kv_heads, dim = shape
    query, key = (1 + 0.2 * torch.randn(2, dim, generator=generator)).to(like)
    return Rotation(query, key, heads, kv_heads, 1e-6)


def random_rope(rows: int, dim: int, generator: torch.Generator, like: Tensor) -> Rope:
    """Random angles for each row, for comparisons."""
    angles = 6 * torch.rand(rows, 1, dim // 2, generator=generator)
    cos, sin = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1)
    return cos.to(like), sin.to(like)
