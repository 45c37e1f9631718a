import pytest
import torch

from gpu_worker.engines.qwen.kernels.candidates import topk


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("vocabulary", [2048, 2049, 100])
def test_topk_is_that_of_torch(rows: int, vocabulary: int) -> None:
    """Selecting groups first changes nothing, even if the vocabulary is not a multiple of the group."""
    scores = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))
    scores[:, -1] = 9.0
    for ours, wanted in zip(topk(scores, 50), scores.topk(50), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(("vocabulary", "count"), [(2048, 50), (2049, 64), (2049, 2049)])
def test_equal_scores_come_in_the_order_that_they_have_alone(vocabulary: int, count: int) -> None:
    """A seed would choose another code in company. In bfloat16 most of the best scores have an equal."""
    scores = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    together = topk(scores, count)[1]

    assert torch.equal(together, torch.cat([topk(row[None], count)[1] for row in scores]))
    assert torch.equal(together[:2], topk(scores[:2], count)[1])
