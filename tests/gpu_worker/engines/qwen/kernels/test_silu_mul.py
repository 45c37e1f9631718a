from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from gpu_worker.engines.qwen.kernels.silu_mul import silu, silu_mul
from tests.gpu_worker.engines.qwen.kernels.comparison import assert_equal
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted

EXTREMES = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 100.0, -100.0, 6e4, -6e4, float("inf"), float("nan")]


@interpreted
@each_dtype("inner", [1, 96, 1000, 3072])
def test_equals_torch(dtype: torch.dtype, inner: int) -> None:
    """Bit for bit in reduced precision, for values of every size, for infinities and NaN."""
    generator = torch.Generator().manual_seed(inner)
    for rows in (1, 3, 9):
        gate_up = (6 * torch.randn(rows, 2 * inner, generator=generator)).to(dtype)
        gate_up[0, : min(inner, len(EXTREMES))] = torch.tensor(EXTREMES[:inner]).to(dtype)
        assert_equal(fused_kernels().silu_mul(gate_up), silu_mul(gate_up), functional.silu(gate_up[:, :inner].double()))


@pytest.fixture
def threads() -> Iterator[None]:
    """So many that a thread's share of the values begins within a vector."""
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_row_has_the_bits_on_a_cpu_that_it_has_alone() -> None:
    """However many rows and threads there are."""
    gate_up = 4 * torch.randn(49, 2 * 3072, generator=torch.Generator().manual_seed(0))
    assert torch.equal(silu_mul(gate_up), torch.cat([silu_mul(row[None]) for row in gate_up]))
    assert torch.equal(silu(gate_up), torch.cat([silu(row[None]) for row in gate_up]))
