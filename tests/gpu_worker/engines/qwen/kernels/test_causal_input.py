import torch

from gpu_worker.engines.qwen.kernels.bias_snake import random_snake
from gpu_worker.engines.qwen.kernels.causal_input import causal_input
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted
from tests.gpu_worker.engines.qwen.kernels.test_bias_snake import CPU, assert_equal


@interpreted
@each_dtype("channels,rows,time", [(768, 1, 2), (96, 54, 32), (16, 6, 70), (5, 2, 1)])
def test_the_kernel_equals_torch(dtype: torch.dtype, channels: int, rows: int, time: int) -> None:
    """With a residual and with Snake, or without; for histories longer and shorter than the chunk."""
    generator = torch.Generator().manual_seed(rows)
    batch = 2
    snake = random_snake(channels, time, generator, CPU, dtype)
    x, added = (3 * torch.randn(2, batch, time, channels, generator=generator)).to(dtype)
    # The histories of several convolutions lie side by side.
    histories = torch.randn(2, batch, rows * channels + 24, generator=generator).to(dtype)
    for residual, activation in ((added, snake), (None, snake), (added, None), (None, None)):
        results = []
        for function in (fused_kernels().causal_input, causal_input):
            old, new = histories.clone()
            given = None if residual is None else residual.clone()
            views = (tensor[:, 8:-16].unflatten(1, (rows, channels)) for tensor in (old, new))
            total, extended = function(x, given, activation, *views)
            assert torch.equal(old, histories[0])
            assert torch.equal(new[:, :8], histories[1, :, :8])
            assert torch.equal(new[:, -16:], histories[1, :, -16:])
            assert torch.equal(new[:, 8:-16].unflatten(1, (rows, channels)), extended[:, -rows:])
            results.append((total, extended))
        (total, extended), (wanted_total, wanted) = results
        assert torch.equal(total, wanted_total)
        assert torch.equal(extended[:, :rows], wanted[:, :rows])
        if activation is None:
            assert torch.equal(extended, wanted)
        else:
            assert_equal(extended[:, rows:], wanted[:, rows:], total, snake)
