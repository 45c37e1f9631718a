"""Choosing codes from logits: per-row parameters, uniforms made beforehand, no host synchronisation.

The order and arithmetic are those of Transformers' processors in float32:
repetition penalty, minimum length, (suppression: the head has no such rows), temperature, top-k, top-p, softmax.
The choice inverts the cumulative distribution over the candidates, best first, at a uniform that belongs to
the request, its frame and its codebook alone: neither batch composition nor timing can change it.
A uniform of 0 takes the best candidate, which is how greedy rows are made.
"""

from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

WIDTH: Final = 64
"""Candidates looked at where every row's top_k allows it; sorting all 2049 takes 4 times as long."""

GROUP: Final = 8
"""Scores looked at as one in the first selection on CPU."""

FEW_ROWS: Final = 3
"""Below this many rows a single selection is quicker."""

_BELOW_ONE: Final = np.float32(1 - 2**-22)
"""Uniforms stop here, so that u * total stays below total after rounding and never reaches a removed candidate."""


class Parameters(msgspec.Struct, frozen=True):
    """Sampling parameters of a batch, one row each: float32 [rows, 1], but `rank` int64 [rows, 1], which is top_k - 1.

    `uniform`: float32 [rows, 1] in [0, 1), 0 for greedy rows.
    """

    temperature: Tensor
    rank: Tensor
    top_p: Tensor
    penalty: Tensor
    uniform: Tensor


def uniforms(seed: int, utterance: int, frames: int, groups: int) -> np.ndarray:
    """The randomness of one utterance, float32 [frames * groups + 1]: the first code, then `groups` a frame.

    Philox is counter based; its key is (seed, utterance), so equal seeds give equal numbers for any `frames`.
    """
    generator = np.random.Generator(np.random.Philox(key=(utterance << 64) | (seed & (1 << 64) - 1)))
    return np.minimum(generator.random(frames * groups + 1, dtype=np.float32), _BELOW_ONE)


def penalise(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the ids of `seen` (bool, like scores) less likely by `penalty`, as RepetitionPenaltyLogitsProcessor does."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(scores: Tensor, parameters: Parameters, width: int) -> Tensor:
    """Choose an id a row, int64 [rows], from float32 scores [rows, vocabulary].

    `width` candidates are looked at, which also bounds every row's top_k.
    Scores equal to the k-th best stay in, as in TopKLogitsWarper, as far as `width` reaches.
    """
    values, ids = best(scores, width)
    values = values / parameters.temperature
    worst = values.gather(1, parameters.rank.clamp(max=width - 1))
    values = values.masked_fill(values < worst, float("-inf"))
    probabilities = values.softmax(-1)
    # TopPLogitsWarper sums from the least likely upwards, and always keeps the best.
    tail = probabilities.flip(-1).cumsum(-1).flip(-1)
    removed = tail <= 1 - parameters.top_p
    removed[:, 0] = False
    cumulative = probabilities.masked_fill(removed, 0.0).cumsum(-1)
    return _invert(cumulative, ids, parameters.uniform * cumulative[:, -1:])


def sample_fixed(logits: Tensor, uniform: Tensor, *, top_k: int, temperature: float) -> Tensor:
    """As `sample`, where top_k and temperature are the same for every row and constant (the code predictor).

    `logits` [rows, vocabulary] of any float dtype, `uniform` [rows, 1] -> int64 [rows].
    Ties at the k-th best are kept, in reduced precision only, where they are common.
    """
    if logits.dtype == torch.float32:
        values, ids = best(logits, top_k)
        values = values if temperature == 1 else values / temperature
    else:
        values, ids = best(logits.float(), min(top_k + WIDTH // 4, logits.shape[-1]))
        values = values / temperature
        values = values.masked_fill(values < values[:, top_k - 1 : top_k], float("-inf"))
    return _invert(values.softmax(-1).cumsum(-1), ids, uniform)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, largest first, and their indices: [rows, vocabulary] -> [rows, count] each.

    torch's selection on CPU spends its time on mispredicted branches, 20 µs a row of 2048.
    The best `count` lie in the `count` groups with the largest maxima: selecting groups first takes half of that.
    """
    rows, vocabulary = scores.shape
    groups = vocabulary // GROUP
    if scores.is_cuda or rows < FEW_ROWS or groups < 2 * count:
        return scores.topk(count)
    grouped = scores[:, : groups * GROUP].view(rows, GROUP, groups)
    chosen = grouped.amax(1).topk(count, sorted=False).indices
    ids = (chosen[:, None] + torch.arange(0, groups * GROUP, groups)[:, None]).view(rows, -1)
    if groups * GROUP < vocabulary:
        rest = torch.arange(groups * GROUP, vocabulary).expand(rows, -1)
        ids = torch.cat((ids, rest), 1)
    values, places = scores.gather(1, ids).topk(count)
    return values, ids.gather(1, places)


def _invert(cumulative: Tensor, ids: Tensor, level: Tensor) -> Tensor:
    """The candidate in whose share of the cumulative distribution the level falls."""
    index = torch.searchsorted(cumulative, level, right=True)
    # A row of NaN finds no place; it must not become an index error that takes its neighbours along.
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1)).squeeze(1)
