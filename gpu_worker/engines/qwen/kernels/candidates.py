"""Sampling from scores in torch: the best scores of each row, and the inverse of a cumulative distribution.

Sampling inverts the cumulative distribution over the candidates, best first, at a uniform that depends on
the request, its frame and its codebook alone: neither the batch nor timing can change the code.
A uniform of 0 takes the best candidate; that is how greedy rows are sampled.
"""

from typing import Final

import torch
from torch import Tensor

CANDIDATES: Final = 64
"""The best scores that are sorted where every row's top_k allows it; sorting all 2049 takes 4 times as long."""

GROUP: Final = 8
"""Scores of one group in `topk` on CPU."""


def topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As torch.topk: the `count` largest of each row and their indices: [rows, vocabulary] -> [rows, count] each.

    On CPU, torch's selection spends its time on mispredicted branches, 20 µs a row of 2048.
    The best `count` scores lie in the `count` groups with the largest maxima: selecting groups first takes half of it.
    A single row would take 2 µs less without, but equal scores would come in another order than in company.
    """
    rows, vocabulary = scores.shape
    groups = vocabulary // GROUP
    if scores.is_cuda and count == vocabulary:
        return scores.sort(stable=True, dim=-1, descending=True)
    if scores.is_cuda or groups < 2 * count:
        return scores.topk(count)
    grouped = scores[:, : groups * GROUP].view(rows, GROUP, groups)
    chosen = grouped.amax(1).topk(count, sorted=False).indices
    ids = (chosen[:, None] + torch.arange(0, groups * GROUP, groups)[:, None]).view(rows, -1)
    if groups * GROUP < vocabulary:
        rest = torch.arange(groups * GROUP, vocabulary).expand(rows, -1)
        ids = torch.cat((ids, rest), 1)
    values, places = scores.gather(1, ids).topk(count)
    return values, ids.gather(1, places)


def invert_cdf(cumulative: Tensor, ids: Tensor, level: Tensor) -> Tensor:
    """The candidate in whose share of the cumulative distribution the level falls."""
    index = torch.searchsorted(cumulative, level, right=True)
    # For a row of NaN the index is out of range; an index error would fail every other row, too.
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1)).squeeze(1)


def different_choice(scores: Tensor, ids: Tensor, wanted: Tensor) -> str | None:
    """None if each row of `ids` is the one of `wanted`, or scores the same: torch sorts equal scores in any order."""
    inside = ids.clamp(0, scores.shape[1] - 1)
    same = (inside == ids) & (scores.gather(1, inside[:, None]) == scores.gather(1, wanted[:, None])).squeeze(1)
    return None if bool(same.all()) else f"differs from torch in the ids of {int((~same).sum())} of {len(ids)} rows"
