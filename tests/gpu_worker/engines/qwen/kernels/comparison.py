"""Comparison of kernels with their references, to the last bit where both must round the same way."""

import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.agreement import difference, places_between

FLOAT32_ERROR = 2.0**-20
"""The largest relative error of a value that was computed in float32, by anybody."""


def assert_equal(ours: Tensor, reference: Tensor, exact: Tensor) -> None:
    """Equal bit for bit, but where the exact value lies so close between two numbers that float32 cannot tell.

    There two units in the last place are allowed: a product follows. In float32 eight are.
    `exact`: the value in float64 before it was last rounded with an error.
    """
    places = places_between(ours, reference)
    if ours.dtype == torch.float32:
        assert int(places.max()) <= 8, f"{int(places.max())} units in the last place"
        return
    lower, upper = ((exact * factor).to(ours.dtype) for factor in (1 - FLOAT32_ERROR, 1 + FLOAT32_ERROR))
    decided = (lower == upper) | exact.isnan()
    assert decided.double().mean() > 0.8
    assert int(places[decided].max()) == 0, f"{int((places[decided] > 0).sum())} of {places.numel()} values differ"
    assert int(places.max()) <= 2, f"{int(places.max())} units in the last place"


def assert_close(ours: Tensor, reference: Tensor, *, scale: float, share: float = 1.0) -> None:
    """Within one unit in the last place of the value or of `scale`; no more than `share` of the values differ."""
    problem = difference(ours, reference, scale=scale, share=share)
    assert problem is None, problem
