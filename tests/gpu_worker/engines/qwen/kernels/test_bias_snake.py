import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.bias_snake import Snake, bias_snake, random_snake, snake_difference
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.comparison import FLOAT32_ERROR
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted

CPU = torch.device("cpu")


def test_snake_equals_the_official_formula() -> None:
    """The formula is x + sin²(x·e^alpha) / e^beta, by channel, for any number of rows that are processed as one."""
    alpha, beta, x = torch.randn(3), torch.randn(3), torch.randn(2, 12, 3)

    for rate in (1, 2, 12):
        y = Snake({"s.alpha": alpha, "s.beta": beta}, "s", rate=rate)(x)

        torch.testing.assert_close(y, x + (x * alpha.exp()).sin() ** 2 / (beta.exp() + 1e-9), atol=1e-6, rtol=1e-6)


def assert_equal(ours: Tensor, reference: Tensor, x: Tensor, snake: Snake) -> None:
    """Equal bit for bit, but where the sine lies so close between two numbers that float32 cannot tell which is nearer.

    In float32 as good as equal. `x` [..., channels]: what Snake was applied to.
    """
    assert snake_difference(ours, reference, x, snake) is None
    if ours.dtype != torch.float32:
        exact = (x * snake.frequency[: snake.channels]).double().sin()
        lower, upper = ((exact * factor).to(ours.dtype) for factor in (1 - FLOAT32_ERROR, 1 + FLOAT32_ERROR))
        decided = lower == upper
        assert decided.double().mean() > 0.95
        assert torch.equal(ours[decided], reference[decided])


@interpreted
@each_dtype("channels,time", [(96, 32), (1, 7), (100, 12), (768, 3)])
def test_the_kernel_equals_torch(dtype: torch.dtype, channels: int, time: int) -> None:
    """Bit for bit in reduced precision, with a bias and without, in one frame and several, for values of every size."""
    generator = torch.Generator().manual_seed(channels)
    snake = random_snake(channels, time, generator, CPU, dtype)
    for batch, frames in ((1, 1), (3, 2)):
        x = (10 ** torch.linspace(-6, 2, batch * frames * time * channels)).view(batch, frames * time, channels)
        x = (x * torch.randn(x.shape, generator=generator)).to(dtype)
        bias = torch.randn(channels, generator=generator).to(dtype)
        for added in (bias, None):
            ours = fused_kernels().bias_snake(x.clone(), added, snake)
            wanted = bias_snake(x.clone(), added, snake)
            assert_equal(ours, wanted, x if added is None else x + added, snake)
