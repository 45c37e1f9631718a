"""Sampling of codes from logits: each row has its parameters and its uniforms, and the host is never waited for.

Owns the arithmetic of sampling. It holds no state of a request.
Order and arithmetic are those of Transformers' processors in float32:
repetition penalty, minimum length, (suppression: the head has no such rows), temperature, top-k, top-p, softmax.
Sampling inverts the cumulative distribution over the candidates, best first, at a uniform that depends on
the request, its frame and its codebook alone: neither the batch nor timing can change the code.
A uniform of 0 takes the best candidate; that is how greedy rows are sampled.
"""

from typing import Final

import msgspec
import numpy as np
import torch
from torch import Tensor

CANDIDATES: Final = 64
"""The best scores that are sorted where every row's top_k allows it; sorting all 2049 takes 4 times as long."""

GROUP: Final = 8
"""Scores of one group in `topk` on CPU."""

FEW_ROWS: Final = 3
"""Below this many rows, torch's own selection is quicker on CPU."""

_BELOW_ONE: Final = np.float32(1 - 2**-22)
"""The largest uniform: u * total stays below total after rounding, so a removed candidate is never sampled."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one utterance is sampled. `top_k` 0 means no limit.

    `greedy` takes the best candidate in talker and code predictor, `greedy_codes` in the code predictor alone.
    """

    greedy: bool
    greedy_codes: bool = False
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    @property
    def full_vocab(self) -> bool:
        """Whether sampling has to sort the full vocabulary instead of its best CANDIDATES."""
        return not self.greedy and not 1 <= self.top_k <= CANDIDATES


class SamplingTensors(msgspec.Struct, frozen=True):
    """Sampling parameters of a batch, one row each: float32 [rows, 1], but `rank` int64 [rows, 1], which is top_k - 1.

    `uniform`: float32 [rows, 1] in [0, 1), 0 for greedy rows.
    """

    temperature: Tensor
    rank: Tensor
    top_p: Tensor
    penalty: Tensor
    uniform: Tensor


def uniforms(seed: int, utterance: int, frames: int, groups: int) -> np.ndarray:
    """The uniforms of one utterance, float32 [frames * groups + 1]: one for the first code, then `groups` a frame.

    Philox is counter based, and its key is (seed, utterance): equal seeds give equal numbers for any `frames`.
    """
    generator = np.random.Generator(np.random.Philox(key=(utterance << 64) | (seed & (1 << 64) - 1)))
    return np.minimum(generator.random(frames * groups + 1, dtype=np.float32), _BELOW_ONE)


def apply_repetition_penalty(scores: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Make the ids of `seen` (bool, shaped like scores) less likely, as RepetitionPenaltyLogitsProcessor does."""
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(scores: Tensor, tensors: SamplingTensors, candidates: int) -> Tensor:
    """Sample an id a row, int64 [rows], from float32 scores [rows, vocabulary].

    Only the best `candidates` scores count, so they also bound every row's top_k.
    Among them, scores equal to the k-th best are kept, as in TopKLogitsWarper.
    """
    values, ids = topk(scores, candidates)
    values = values / tensors.temperature
    worst = values.gather(1, tensors.rank.clamp(max=candidates - 1))
    values = values.masked_fill_(values < worst, float("-inf"))
    probabilities = values.softmax(-1)
    # TopPLogitsWarper sums from the least likely candidate upwards, and always keeps the best.
    tail = probabilities.flip(-1).cumsum(-1).flip(-1)
    removed = tail <= 1 - tensors.top_p
    removed[:, 0] = False
    cumulative = probabilities.masked_fill(removed, 0.0).cumsum(-1)
    return _invert_cdf(cumulative, ids, tensors.uniform * cumulative[:, -1:])


def sample_fixed(logits: Tensor, uniform: Tensor, *, top_k: int, temperature: float) -> Tensor:
    """As `sample`, for the code predictor, whose top_k and temperature are constant and the same for every row.

    `logits` [rows, vocabulary] of any float dtype, `uniform` [rows, 1] -> int64 [rows].
    Ties at the k-th best are kept in reduced precision only, where they are common.
    """
    if logits.dtype == torch.float32:
        values, ids = topk(logits, top_k)
        values = values if temperature == 1 else values / temperature
    else:
        values, ids = topk(logits.float(), min(top_k + CANDIDATES // 4, logits.shape[-1]))
        values = values / temperature
        values = values.masked_fill_(values < values[:, top_k - 1 : top_k], float("-inf"))
    return _invert_cdf(values.softmax(-1).cumsum(-1), ids, uniform)


def topk(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As torch.topk: the `count` largest of each row and their indices: [rows, vocabulary] -> [rows, count] each.

    On CPU, torch's selection spends its time on mispredicted branches, 20 µs a row of 2048.
    The best `count` scores lie in the `count` groups with the largest maxima: selecting groups first takes half of it.
    """
    rows, vocabulary = scores.shape
    groups = vocabulary // GROUP
    if scores.is_cuda and count == vocabulary:
        return scores.sort(stable=True, dim=-1, descending=True)
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


def _invert_cdf(cumulative: Tensor, ids: Tensor, level: Tensor) -> Tensor:
    """The candidate in whose share of the cumulative distribution the level falls."""
    index = torch.searchsorted(cumulative, level, right=True)
    # For a row of NaN the index is out of range; an index error would fail every other row, too.
    return ids.gather(1, index.clamp_(max=ids.shape[1] - 1)).squeeze(1)
