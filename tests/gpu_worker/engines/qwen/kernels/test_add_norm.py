import torch

from gpu_worker.engines.qwen.kernels.add_norm import add_norm
from gpu_worker.engines.qwen.kernels.norm import Norm
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.comparison import assert_equal
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted


@interpreted
@each_dtype("hidden", [1, 8, 96, 1000, 2048])
def test_equals_torch(dtype: torch.dtype, hidden: int) -> None:
    """Sum and norm, bit for bit, for rows of any size, of zeros, of huge values, and for rows that lie apart."""
    generator = torch.Generator().manual_seed(hidden)
    norm = Norm((1 + 0.3 * torch.randn(hidden, generator=generator)).to(dtype), 1e-6)
    for rows in (1, 2, 9):
        scale = torch.tensor([1.0, 1e-4, 100.0] * 3)[:rows, None]
        wide, y = (scale * torch.randn(2, rows, 2 * hidden, generator=generator)).to(dtype)
        x, y = wide[:, :hidden], y[:, hidden:].contiguous()
        x[-1], y[-1] = (0, 0) if rows == 2 else (x[-1], y[-1])
        total, normed = fused_kernels().add_norm(x, y, norm)
        reference, reference_normed = add_norm(x, y, norm)
        assert torch.equal(total, reference)
        exact = reference.double()
        exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert_equal(normed, reference_normed, exact)


@interpreted
def test_a_row_depends_on_no_other() -> None:
    """A row of NaN and one of infinities leave the row between them as it is."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 64, generator=generator).bfloat16()
    norm = Norm(torch.ones(64, dtype=torch.bfloat16), 1e-6)
    _, alone = fused_kernels().add_norm(x[1:2], y[1:2], norm)
    x[0], x[2] = float("nan"), float("inf")
    _, together = fused_kernels().add_norm(x, y, norm)
    assert torch.equal(together[1:2], alone)
    assert together[0].isnan().all()
