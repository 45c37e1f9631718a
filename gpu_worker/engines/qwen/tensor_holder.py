"""TensorHolder: finds the tensors of an object, so that weights are moved and captured without lists of them."""

from collections.abc import Iterator

from torch import Tensor


class TensorHolder:
    """Finds the tensors in its attributes, in lists there, and in the TensorHolders there."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor held, directly or below; a tensor held twice comes twice."""
        for value in vars(self).values():
            for item in value if isinstance(value, list) else (value,):
                if isinstance(item, Tensor):
                    yield item
                elif isinstance(item, TensorHolder):
                    yield from item.tensors()
