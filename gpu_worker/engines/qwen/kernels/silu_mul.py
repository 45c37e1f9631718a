"""silu(gate) * up, of a product that holds both: one kernel instead of two."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from gpu_worker.engines.qwen.kernels.agreement import difference

ROWS_AT_ONCE: Final = 16
"""Rows that a CPU computes in one call. Of more, torch gives each thread a share that may begin within a vector.

It computes what does not fill a vector with another exponential function: bits of a row would depend on the others.
"""

SiluMul = Callable[[Tensor], Tensor]
"""[rows, 2 * inner], the gate first -> [rows, inner]."""


def silu(x: Tensor) -> Tensor:
    """Silu of [rows, values], in which a row does not depend on the others."""
    if len(x) > ROWS_AT_ONCE and not x.is_cuda:
        return torch.cat([functional.silu(rows) for rows in x.split(ROWS_AT_ONCE)])
    return functional.silu(x)


def silu_mul(gate_up: Tensor) -> Tensor:
    """The reference. It rounds after the silu and after the product."""
    inner = gate_up.shape[1] // 2
    gate, up = gate_up.split_with_sizes((inner, inner), 1)
    return silu(gate).mul_(up)


def disagreement(fused: SiluMul, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    gate_up = (4 * torch.randn(8, 2 * 3072, generator=generator)).to(device, dtype)
    return difference(fused(gate_up), silu_mul(gate_up), share=0.01)
