import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.next_codebook0 import sample
from gpu_worker.engines.qwen.kernels.sample_code import sample_code
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from tests.gpu_worker.engines.qwen.kernels.distributions import inverse, official, parameters
from tests.gpu_worker.engines.qwen.kernels.interpreter import each_dtype, interpreted

LARGEST = 1 - 2**-22
"""The largest uniform that the engine makes."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_are_those_of_transformers_processors(dtype: torch.dtype) -> None:
    """In reduced precision, with all of its ties, as well."""
    logits = (torch.randn(300, 2048, generator=torch.Generator().manual_seed(4)) * 4).to(dtype)
    uniform = torch.rand(300, 1, generator=torch.Generator().manual_seed(5))
    ours = sample_code(logits, uniform, None, None, top_k=50, temperature=0.9)
    probabilities = official(logits.float(), temperature=0.9, top_k=50, top_p=1.0)
    wanted = inverse(probabilities, uniform)
    # Among ties any order will do: equal probabilities are equal choices.
    same = probabilities.gather(1, ours[:, None]) == probabilities.gather(1, wanted[:, None])
    assert same.float().mean() > 0.99


def by_kernel(logits: Tensor, uniform: Tensor, *, top_k: int = 50, temperature: float = 0.9) -> Tensor:
    """The codes that the kernel samples."""
    return fused_kernels().sample_code(logits, uniform, None, None, top_k=top_k, temperature=temperature)


@interpreted
@each_dtype("vocabulary,top_k,step", [(2048, 50, 0.5), (2048, 50, 0), (100, 1, 0.5), (100, 99, 0), (1, 50, 0)])
def test_the_kernel_chooses_as_torch(dtype: torch.dtype, vocabulary: int, top_k: int, step: float) -> None:
    """The same ids for equal uniforms. Rows of multiples of `step` have many equal scores, also at the k-th best."""
    rows = 4
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits = ((logits / step).round() * step if step else logits).to(dtype)
    uniform = torch.rand(rows, 1, generator=generator)
    uniform[0] = 0
    ours = by_kernel(logits, uniform, top_k=top_k)
    limited = min(top_k, vocabulary)
    wanted = sample(
        logits.float(), parameters(rows, temperature=0.9, top_k=limited, top_p=1.0, uniform=uniform), vocabulary
    )
    assert torch.equal(*(logits.gather(1, ids[:, None]) for ids in (ours, wanted)))
    assert ours[0] == logits[0].float().argmax()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_scores_are_ordered_by_their_ids(dtype: torch.dtype) -> None:
    """As a stable sort leaves them. Zeros of both signs are equal, and top_k removes none of its ties."""
    uniform = torch.tensor([[0.0], [0.495], [0.515], [LARGEST]])
    assert by_kernel(torch.zeros(4, 100, dtype=dtype), uniform, top_k=3).tolist() == [0, 49, 51, 99]
    signs = torch.full((4, 100), -1.0)
    signs[:, 10:20:2], signs[:, 11:20:2] = 0.0, -0.0
    assert by_kernel(signs.to(dtype), uniform, top_k=3).tolist() == [10, 14, 15, 19]


@interpreted
def test_both_sides_of_every_boundary() -> None:
    """Just below the sum of the shares up to an id, that id is sampled, and just above it the next one."""
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).sort(descending=True).values
    ends = (logits[:, :8].double() / 0.9).softmax(-1).cumsum(-1).t()[:-1]
    for offset, first in ((-1e-6, 0), (1e-6, 1)):
        uniform = (ends + offset).float()
        assert by_kernel(logits.expand(7, -1), uniform, top_k=8).tolist() == list(range(first, first + 7))


@interpreted
def test_the_kernels_frequencies_are_those_of_the_distribution() -> None:
    """Of uniforms that divide the interval evenly, each id gets its share, within one."""
    draws = 40
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).bfloat16()
    uniform = (torch.arange(draws) + 0.5)[:, None] / draws
    counts = torch.bincount(by_kernel(logits.expand(draws, -1), uniform, top_k=12), minlength=40)
    expected = draws * official(logits.float(), temperature=0.9, top_k=12, top_p=1.0)[0]
    assert (counts - expected).abs().max() <= 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_without_a_distribution_harm_no_other(dtype: torch.dtype) -> None:
    """NaN, infinities: some id of the vocabulary, and every other row is sampled as ever."""
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[1] = float("nan")
    logits[2, 50] = float("nan")
    logits[3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, 70] = 1
    uniform = torch.full((6, 1), 0.9)
    chosen = by_kernel(logits, uniform)
    assert ((chosen >= 0) & (chosen < 100)).all()
    assert chosen[4] == 70
    wanted = sample_code(logits, uniform, None, None, top_k=50, temperature=0.9)
    assert torch.equal(chosen[[0, 5]], wanted[[0, 5]])


@interpreted
@pytest.mark.parametrize("width", [16, 1000, 5120])
def test_the_next_input_is_the_row_of_the_code(width: int) -> None:
    """Copied bit for bit; the rows behind the batch, which are padding, stay."""
    logits = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    table = torch.randn(64, width).bfloat16()
    inputs = torch.full((4, width), 7.0).bfloat16()
    uniform = torch.rand(3, 1)
    codes = fused_kernels().sample_code(logits, uniform, table, inputs[:3], top_k=50, temperature=0.9)
    assert torch.equal(inputs[:3], table[codes])
    assert (inputs[3] == 7).all()
    wanted = torch.empty(3, width).bfloat16()
    sample_code(logits, uniform, table, wanted, top_k=50, temperature=0.9)
    assert torch.equal(inputs[:3], wanted)
