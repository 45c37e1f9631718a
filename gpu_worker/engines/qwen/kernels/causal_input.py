"""The input of a causal convolution of the codec: its last inputs of the chunk before, and those of this chunk.

One kernel instead of three, or of eight if a residual is added and Snake is applied on the way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference
from gpu_worker.engines.qwen.kernels.bias_snake import Snake, random_snake, snake_difference

CausalInput = Callable[[Tensor, Tensor | None, Snake | None, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, added, snake, old, new) -> the sum of x and added, and what the convolution reads.

`x` [batch, time, channels]. `added`: the same or None; it may be overwritten. `snake`: applied to the sum, or None.
`old` [batch, rows, channels]: the rows that come before. What the convolution reads is [batch, rows + time, channels].
`new`, shaped like `old`: gets its last rows. A kernel needs two tensors; for the reference they may be one.
"""


def causal_input(
    x: Tensor, added: Tensor | None, snake: Snake | None, old: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference. It rounds after the sum, and where Snake does."""
    if added is not None:
        x = added.add_(x)
    extended = torch.cat((old, x if snake is None else snake(x)), 1)
    new.copy_(extended[:, -old.shape[1] :])
    return x, extended


def disagreement(fused: CausalInput, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    channels, frame = 96, 32
    for rows, time in ((54, frame), (6, 2 * frame)):
        snake = random_snake(channels, frame, generator, device, dtype)
        x, added = (3 * torch.randn(2, 2, time, channels, generator=generator)).to(device, dtype)
        old = torch.randn(2, rows, channels, generator=generator).to(device, dtype)
        for residual, activation in ((added, snake), (None, snake), (None, None)):
            both = []
            for function in (fused, causal_input):
                new = torch.zeros_like(old)
                given = None if residual is None else residual.clone()
                both.append((*function(x, given, activation, old, new), new))
            (total, extended, new), (wanted_total, wanted, _) = both
            problem = difference(total, wanted_total, share=0)
            if problem is None and activation is None:
                problem = difference(extended, wanted, share=0)
            elif problem is None:
                problem = difference(extended[:, :rows], wanted[:, :rows], share=0)
                problem = problem or snake_difference(extended[:, rows:], wanted[:, rows:], wanted_total, snake)
            if problem is None and not torch.equal(new, extended[:, -rows:]):
                problem = "differs from torch in the history"
            if problem is not None:
                return problem
    return None
