"""A product with quantised weights: one kernel, as the plain product is, that reads half of its bytes.

Weights are int8 or float8 (e4m3) with a scale for each output; activations keep their 16 bits.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference

QuantizedLinear = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(x, weight, scale, bias) -> x Wᵀ + bias, where W is `weight` with each row times its scale.

`x` [rows, in], bfloat16 or float16. `weight` [out, in], int8 or float8_e4m3fn. `scale` [out], float32. `bias` [out].
A row's bits depend on that row alone: not on the number of rows, and not on the other rows.
"""

GREATEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The greatest value of each dtype of weights."""

_SMALLEST: Final = 1e-30
_ROWS_AT_ONCE: Final = 1024
"""Of a matrix: so float32 copies of it take 25 MB at most, where memory may be short."""


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weights in `dtype`, and the scale of each output: the greatest value of its row becomes GREATEST."""
    parts, scales = [], []
    for rows in weight.split(_ROWS_AT_ONCE):
        wide = rows.to(torch.float32, copy=True)
        scale = wide.abs().amax(1).clamp_(min=_SMALLEST) / GREATEST[dtype]
        wide /= scale[:, None]
        parts.append((wide.round_() if dtype == torch.int8 else wide).to(dtype))
        scales.append(scale)
    return torch.cat(parts), torch.cat(scales)


def quantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The reference. It computes in float32 and rounds once, at the end."""
    product = torch.mm(x.float(), weight.float().t()) * scale
    return (product if bias is None else product + bias.float()).to(x.dtype)


def int8_disagreement(fused: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random values, or a row from itself alone; None if neither does."""
    return _disagreement(fused, torch.int8, device, dtype)


def fp8_disagreement(fused: QuantizedLinear, device: torch.device, dtype: torch.dtype) -> str | None:
    """The same with weights of float8."""
    return _disagreement(fused, torch.float8_e4m3fn, device, dtype)


def _disagreement(fused: QuantizedLinear, weights: torch.dtype, device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    inputs, rows = 1024, 40
    for outputs, biased in ((96, True), (160, False)):
        matrix = torch.randn(outputs, inputs, generator=generator).to(device, dtype)
        weight, scale = quantize(matrix, weights)
        x = (torch.randn(rows, inputs, generator=generator) / inputs**0.5).to(device, dtype)
        bias = torch.randn(outputs, generator=generator).to(device, dtype) if biased else None
        together = fused(x, weight, scale, bias)
        if problem := difference(together, quantized_linear(x, weight, scale, bias), share=0.01, scale=1.0):
            return problem
        for row, company in ((rows - 1, 1), (3, 5), (17, 16)):
            some = fused(x[row : row + company].clone(), weight, scale, bias)
            if not torch.equal(some, together[row : row + company]):
                return "has rows that depend on their company"
    return None
