"""The agreement of two functions' results, in units in the last place.

Owns the measure. The operations own the inputs and the limits.
"""

from typing import Final

import torch
from torch import Tensor

FLOAT32_PLACES: Final = 64
"""Units in the last place that a function in float32 may be off: sums of thousands differ by their order."""

_INTEGERS: Final = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def places_between(one: Tensor, other: Tensor) -> Tensor:
    """Representable numbers from each value of `one` to that of `other`, int64. Two NaN are 0 apart, both zeros too."""

    def ordinal(values: Tensor) -> Tensor:
        bits = values.contiguous().view(_INTEGERS[values.dtype]).long()
        lowest = -(1 << (8 * values.element_size() - 1))
        return torch.where(bits < 0, lowest - bits, bits)

    distance = (ordinal(one) - ordinal(other)).abs()
    return distance.masked_fill(one.isnan() & other.isnan(), 0)


def difference(ours: Tensor, reference: Tensor, *, share: float = 1.0, scale: float = 0.0) -> str | None:
    """None if every value is within one unit in the last place of the reference (in float32: FLOAT32_PLACES).

    `share`: the largest share of values that may differ at all, in reduced precision. A missing or additional rounding
    changes a fifth of them.
    `scale`: the size of the terms, for sums in which they may cancel. One unit in its last place is allowed as well.
    """
    places = places_between(ours, reference)
    reduced = ours.dtype != torch.float32
    allowed = 1 if reduced else FLOAT32_PLACES
    near = (ours.float() - reference.float()).abs() <= allowed * scale * torch.finfo(ours.dtype).eps
    worst = int(places.masked_fill(near, 0).max())
    if worst > allowed:
        return f"differs from torch by {worst} units in the last place"
    differing = float((places > 0).double().mean())
    if reduced and differing > share:
        return f"differs from torch in {differing:.1%} of all values"
    return None
