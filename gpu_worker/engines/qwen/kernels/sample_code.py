"""A code of the code predictor from its logits, and the input that the code is for the next forward."""

from typing import Protocol

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.candidates import CANDIDATES, different_choice, invert_cdf, topk


class SampleCode(Protocol):
    """Samples with one top_k and one temperature for all rows."""

    def __call__(
        self,
        logits: Tensor,
        uniform: Tensor,
        table: Tensor | None,
        inputs: Tensor | None,
        *,
        top_k: int,
        temperature: float,
    ) -> Tensor:
        """`logits` [rows, vocabulary] of any float dtype, `uniform` float32 [rows, 1] -> int64 [rows].

        Each code's row of `table` [vocabulary, values], if it is given, goes into `inputs` [rows, values].
        """


def sample_code(
    logits: Tensor,
    uniform: Tensor,
    table: Tensor | None,
    inputs: Tensor | None,
    *,
    top_k: int,
    temperature: float,
) -> Tensor:
    """The reference. It keeps scores that are equal to the k-th best in reduced precision only, where they are common.

    It keeps up to CANDIDATES // 4 of them, a kernel all.
    """
    if logits.dtype == torch.float32:
        values, ids = topk(logits, top_k)
        values = values if temperature == 1 else values / temperature
    else:
        values, ids = topk(logits.float(), min(top_k + CANDIDATES // 4, logits.shape[-1]))
        values = values / temperature
        values = values.masked_fill_(values < values[:, top_k - 1 : top_k], float("-inf"))
    code = invert_cdf(values.softmax(-1).cumsum(-1), ids, uniform)
    if table is not None:
        torch.index_select(table, 0, code, out=inputs)
    return code


def disagreement(fused: SampleCode, device: torch.device, dtype: torch.dtype) -> str | None:
    """How `fused` differs from the reference over random logits; None if it does not."""
    generator = torch.Generator().manual_seed(0)
    rows, vocabulary, values = 4, 2048, 5120
    logits = (3 * torch.randn(rows, vocabulary, generator=generator)).to(device, dtype)
    uniform = torch.rand(rows, 1, generator=generator).to(device)
    uniform[0] = 0
    table = torch.randn(vocabulary, values, generator=generator).to(device, dtype)
    inputs = table.new_zeros(rows, values)
    codes = fused(logits, uniform, table, inputs, top_k=50, temperature=0.9)
    wanted = sample_code(logits, uniform, None, None, top_k=50, temperature=0.9)
    return different_choice(logits, codes, wanted) or (
        None if torch.equal(inputs, table.index_select(0, codes)) else "differs from torch in the rows of the table"
    )
