import pytest
import torch

from gpu_worker.engines.qwen.kernels.norm import Norm
from tests.gpu_worker.engines.qwen.parity import official


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rounds_where_the_official_one_does(dtype: torch.dtype) -> None:
    """Equal to the last bit in bfloat16, to rounding in float32."""
    theirs = type(official("custom_voice", None).model.talker.model.norm)(64).to(dtype)
    theirs.weight.data.normal_(1, 0.2)
    x = torch.randn(50, 64).to(dtype)
    ours = Norm(theirs.weight.data, 1e-6)(x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs(x).detach(), rtol=0 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_norms_weight_is_folded_into_the_matrix_that_reads_it() -> None:
    """In float32 the product is the same, to rounding. In bfloat16 nothing is folded: that would round elsewhere."""
    weight, matrix, x = torch.randn(64), torch.randn(8, 64), torch.randn(5, 64)
    wanted = Norm(weight, 1e-6)(x) @ matrix.t()
    norm = Norm(weight, 1e-6)
    (folded,) = norm.fold_into([matrix])
    torch.testing.assert_close(norm(x) @ folded.t(), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(norm(x), Norm(weight, 1e-6)(x))
    reduced = Norm(weight.bfloat16(), 1e-6)
    (same,) = reduced.fold_into([matrix.bfloat16()])
    assert torch.equal(same, matrix.bfloat16())
    assert reduced.weight is not None
