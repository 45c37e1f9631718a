"""TensorHolder: finds the tensors of an object, so that weights are moved and captured without lists of them."""

import itertools
from collections.abc import Iterator

from torch import Tensor


class TensorHolder:
    """Finds the tensors in its attributes, in lists there, and in the TensorHolders there."""

    hidden_bytes = 0

    def all_hidden_bytes(self) -> int:
        """Bytes of weights, here and below, that no tensor counts: kernels keep them in memory of their own."""
        items = itertools.chain(*(value if isinstance(value, list) else (value,) for value in vars(self).values()))
        return self.hidden_bytes + sum(item.all_hidden_bytes() for item in items if isinstance(item, TensorHolder))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, directly or below; a tensor held twice comes twice."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Tensor):
                    yield item
                elif isinstance(item, TensorHolder):
                    yield from item.tensors()
