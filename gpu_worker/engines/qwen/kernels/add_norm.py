"""The residual sum and the norm behind it: one kernel instead of three."""

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference
from gpu_worker.engines.qwen.kernels.norm import Norm

AddNorm = Callable[[Tensor, Tensor, Norm], tuple[Tensor, Tensor]]
"""x and y, [rows, hidden] each, and a norm with a weight -> x + y, and its norm."""


def add_norm(x: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """The reference. It rounds after the sum, after the norm, and after the weight."""
    total = x + y
    return total, norm(total)


def disagreement(fused: AddNorm, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values of published widths; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    for hidden in (1024, 2048):
        x, y = (3 * torch.randn(2, 8, hidden, generator=generator)).to(device, dtype)
        norm = Norm((1 + 0.2 * torch.randn(hidden, generator=generator)).to(device, dtype), 1e-6)
        for ours, reference in zip(fused(x, y, norm), add_norm(x, y, norm), strict=True):
            if problem := difference(ours, reference, share=0.01):
                return problem
    return None
