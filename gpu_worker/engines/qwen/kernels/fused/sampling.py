"""The part that all sampling kernels share: the id that a uniform takes from a row of scores.

Nothing is sorted. Three bounds are found by bisection: that of top_k, that of top_p, and that at which the cumulative
distribution passes the uniform. Each is the highest for which a count or a sum over one side still meets a condition.
The shape of these sums does not depend on the bound, so rounding cannot make a larger side smaller.
Equal scores are ordered by their ids, as a stable sort leaves them.
"""

from typing import Final

import triton
import triton.language as tl

COPIED: Final = 1024
"""Values of a row that are copied at a time, once its id is known."""


@triton.jit
def ordered(x):
    """int32 numbers in the order of the float32 values `x`. Both zeros are equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def sample_row(scores, valid, columns, uniform, temperature, top_k, top_p, shift: tl.constexpr):
    """The column that `uniform` samples, of one row of float32 scores. A row of NaN gives some valid column.

    `shift`: low bits in which the scores cannot differ, because they were widened.
    """
    keys = tl.where(valid, ordered(scores) >> shift, -0x7FFFFFFF)
    lowest = tl.min(tl.where(valid, keys, 0x7FFFFFFF), 0)
    best = tl.max(keys, 0)

    low = lowest
    high = best
    while low < high:  # for the highest bound that top_k scores reach, or for one that no more than these reach
        middle = (low | high) - ((low ^ high) >> 1)  # half of the sum, rounded up: the sum itself may overflow
        reached = tl.sum((keys >= middle).to(tl.int32), 0)
        low = tl.where(reached >= top_k, middle, low)
        high = tl.where(reached > top_k, high, tl.where(reached == top_k, middle, middle - 1))
    worst = tl.min(tl.where(keys >= low, scores, float("inf")), 0)
    scaled = tl.where(valid, tl.div_rn(scores, temperature), float("-inf"))
    kept = valid & (scaled >= tl.div_rn(worst, temperature))  # dividing may make more scores equal to the worst
    shares = tl.where(kept, tl.exp(scaled - tl.max(scaled, 0)), 0.0)
    shares = tl.div_rn(shares, tl.sum(shares, 0))

    if top_p < 1.0:
        # From the least likely upwards, what has not passed 1 - top_p is removed, but never the best.
        limit = 1.0 - top_p
        low = lowest
        high = best
        while low < high:
            middle = (low | high) - ((low ^ high) >> 1)
            passed = tl.sum(tl.where(keys < middle, shares, 0.0), 0) > limit
            low = tl.where(passed, low, middle)
            high = tl.where(passed, middle - 1, high)
        tied = kept & (keys == low)
        rank = tl.cumsum(tied.to(tl.int32), 0)
        behind = (tl.sum(tied.to(tl.int32), 0) - rank + 1).to(tl.float32) * tl.max(tl.where(tied, shares, 0.0), 0)
        passed = tl.sum(tl.where(keys < low, shares, 0.0), 0) + behind > limit
        stays = passed | ((rank == 1) & (low == best))
        shares = tl.where((keys > low) | (tied & stays), shares, 0.0)

    level = uniform * tl.sum(shares, 0)
    low = lowest
    high = best
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)
        passed = tl.sum(tl.where(keys >= middle, shares, 0.0), 0) > level
        low = tl.where(passed, middle, low)
        high = tl.where(passed, high, middle - 1)
    tied = (keys == low) & (shares > 0.0)
    share = tl.max(tl.where(tied, shares, 0.0), 0)
    last = (tl.sum(tied.to(tl.int32), 0) - 1).to(tl.float32)
    rest = level - tl.sum(tl.where(keys > low, shares, 0.0), 0)
    place = tl.where(share > 0.0, tl.div_rn(rest, share), 0.0)
    place = tl.minimum(tl.maximum(place, 0.0), last).to(tl.int32)
    chosen = tied & (tl.cumsum(tied.to(tl.int32), 0) == place + 1)
    return tl.sum(tl.where(chosen, columns, 0), 0)
