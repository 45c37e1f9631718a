"""Snake, the codec's activation, and the bias of the convolution before it: one kernel instead of five."""

import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import FLOAT32_PLACES
from gpu_worker.engines.qwen.tensor_holder import TensorHolder

SNAKE_WIDTH: Final = 256
"""Contiguous values that an elementwise kernel of torch should process with one set of parameters."""

ROUNDED_OTHERWISE: Final = 0.01
"""Share of values for which another sine of float32 may be rounded to another number of reduced precision."""


class Snake(TensorHolder):
    """SnakeBeta: x + sin(x·e^alpha)² / e^beta, by channel. The constructor computes the exponentials once.

    If there are few channels, several rows are processed as one, with repeated parameters.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, *, rate: int) -> None:
        alpha, beta = (weights[f"{prefix}.{name}"] for name in ("alpha", "beta"))
        self.channels = alpha.shape[0]
        together = math.gcd(rate, max(1, SNAKE_WIDTH // self.channels))
        self.frequency = alpha.float().exp().to(alpha.dtype).repeat(together)
        self.magnitude = (1 / (beta.float().exp() + 1e-9)).to(beta.dtype).repeat(together)

    def __call__(self, x: Tensor) -> Tensor:
        """[batch, time, channels] -> the same. `time` must be whole frames.

        It rounds after the product, the sine, the square and the sum.
        """
        rows = x.reshape(-1, self.frequency.shape[0])
        wave = (rows * self.frequency).sin_()
        return torch.addcmul(rows, wave.square_(), self.magnitude, out=wave).view(x.shape)


BiasSnake = Callable[[Tensor, Tensor | None, Snake], Tensor]
"""x [batch, time, channels], which may be overwritten, a bias [channels] or None -> Snake of x + bias."""


def bias_snake(x: Tensor, bias: Tensor | None, snake: Snake) -> Tensor:
    """The reference. It rounds after the bias, as the convolutions of torch do on CUDA, and where Snake does."""
    return snake(x if bias is None else x.add_(bias))


def random_snake(
    channels: int, rate: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Snake:
    """Snake with parameters around those of published codecs."""
    alpha, beta = (0.5 * torch.randn(2, channels, generator=generator)).to(device, dtype)
    return Snake({"snake.alpha": alpha, "snake.beta": beta}, "snake", rate=rate)


def snake_difference(ours: Tensor, reference: Tensor, x: Tensor, snake: Snake) -> str | None:
    """None if `ours` is the reference of Snake of `x` but for a sine that was rounded the other way.

    That error is measured by the terms of the sum, which may cancel each other. Few values may have one:
    a missing or additional rounding changes a fifth of them.
    """
    information = torch.finfo(ours.dtype)
    terms = x.float().abs() + snake.magnitude[: snake.channels].float()
    errors = (ours.float() - reference.float()).abs() / (information.eps * terms)
    reduced = ours.dtype != torch.float32
    if not bool((errors <= (4 if reduced else FLOAT32_PLACES)).all()):
        return f"differs from torch by {float(errors.max()):.1f} units in the last place of a term"
    differing = float((errors > 0).double().mean())
    if reduced and differing > ROUNDED_OTHERWISE:
        return f"differs from torch in {differing:.1%} of all values"
    return None


def disagreement(fused: BiasSnake, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    for channels in (96, 768):
        snake = random_snake(channels, 32, generator, device, dtype)
        x = (3 * torch.randn(2, 64, channels, generator=generator)).to(device, dtype)
        bias = torch.randn(channels, generator=generator).to(device, dtype)
        for added in (bias, None):
            ours, reference = (function(x.clone(), added, snake) for function in (fused, bias_snake))
            if problem := snake_difference(ours, reference, x if added is None else x + added, snake):
                return problem
    return None
