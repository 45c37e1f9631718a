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
