import pytest
import torch

from gpu_worker.engines.qwen.kernels.frame_attention import frame_attention
from gpu_worker.engines.qwen.kernels.rotation import random_rope, random_rotation
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.comparison import assert_close
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted
from tests.gpu_worker.engines.qwen.kernels.test_rotate_and_cache import SHAPES


@interpreted
@each_dtype("shape", SHAPES)
def test_equals_torch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """A whole frame: two tokens, then one at each position, rotated by the kernel or before; results and cache."""
    heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(dim)
    rows = {128: 1, 8: 9}.get(dim, 2)
    positions = (0, 2, 3, 16)
    caches = torch.zeros(2, 2, rows, positions[-1] + 1, kv_heads, dim, dtype=dtype)
    weights = random_rotation(shape, generator, caches)
    for position in positions:
        tokens = 1 if position else 2
        values = heads + 2 * kv_heads
        # Inputs of known codes stand in rows with other values before them.
        wide = torch.randn(rows * tokens, values + 1, dim, generator=generator).to(dtype)
        qkv = wide[:, 1:] if position % 3 == 2 else wide[:, 1:].contiguous()
        rope = random_rope(1 if position else 2 * rows, dim, generator, qkv)
        rotation = None if position % 3 == 2 else (weights, rope)
        by_group = position % 2 == 0
        ours, reference = (
            function(qkv, rotation, (cache[0], cache[1]), position, by_group=by_group)
            for function, cache in zip((fused_kernels().frame_attention, frame_attention), caches, strict=True)
        )
        assert_close(ours, reference, scale=float(caches[1, 1].abs().max()))
        caches[0] = caches[1] if position == 0 else caches[0]  # later differences are not those of the first
    assert_close(caches[0], caches[1], scale=4.0, share=0.05)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    """Equal scores share evenly; one score that is far above the others takes all; NaN stays in its row and head."""
    cache = torch.zeros(2, 2, 4, 2, 16, dtype=dtype)
    qkv = torch.zeros(2, 8, 16, dtype=dtype)
    cache[1, :, 0], cache[1, :, 1], qkv[:, 6:] = 3, 6, 0
    fused = fused_kernels().frame_attention
    assert fused is not None
    out = fused(qkv, None, (cache[0], cache[1]), 2, by_group=False)
    assert torch.equal(out, torch.full((2, 64), 3.0, dtype=dtype))
    cache[0, :, 1], qkv[:, :4] = 100, 100
    cache[1, 1, 0, 1] = float("nan")
    out = fused(qkv, None, (cache[0], cache[1]), 2, by_group=False).view(2, 4, 16)
    assert torch.equal(out[0], torch.full((4, 16), 6.0, dtype=dtype))
    assert torch.equal(out[1, :2], torch.full((2, 16), 6.0, dtype=dtype))
    assert out[1, 2:].isnan().all()
