import torch

from gpu_worker.engines.qwen.kernels.rotate_and_cache import rotate_and_cache
from gpu_worker.engines.qwen.kernels.rotation import random_rope, random_rotation
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.comparison import assert_close
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted

SHAPES = [(16, 8, 128), (4, 2, 32), (6, 2, 10), (3, 3, 16), (4, 1, 8)]
"""Heads, KV heads, head_dim: the published ones, those of small checkpoints, and odd ones."""


@interpreted
@each_dtype("shape", SHAPES)
def test_equals_torch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Queries, keys, values and the cache, for any slots and positions; nothing else in the cache is touched."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(dim)
    for rows, by_group in {8: [(9, True)], 128: [(2, True)]}.get(dim, [(1, False), (3, True)]):
        qkv = (3 * torch.randn(rows, heads + 2 * kv_heads, dim, generator=generator)).to(dtype)
        qkv[0, 0] = 0
        rotation = random_rotation(shape, generator, qkv)
        rope = random_rope(rows, dim, generator, qkv)
        places = torch.randperm(10, generator=generator)[:rows], torch.randint(0, 7, (rows,), generator=generator)
        results = []
        for function in (fused_kernels().rotate_and_cache, rotate_and_cache):
            cache = torch.full((2, 10, 7, kv_heads, dim), 7.0, dtype=dtype)
            written = function(qkv, rotation, rope, (cache[0], cache[1]), places, by_group=by_group)
            results.append((*written, cache))
        ours, reference = results
        for one, other in zip(ours, reference, strict=True):
            assert one.shape == other.shape
            assert_close(one, other, scale=4.0, share=0.05)
        assert (ours[0].transpose(1, 2) if by_group else ours[0]).is_contiguous()
        assert torch.equal(ours[3] == 7, reference[3] == 7)
