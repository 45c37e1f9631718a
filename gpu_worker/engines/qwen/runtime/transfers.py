"""Small transfers between host and device that wait for nothing.

Owns the pinned copies and the events that tell when they are complete. On CPU a copy is complete at once.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Begin to copy numbers to the device, as int64 [numbers].

    The host's copy is pinned. An unpinned one would wait for all earlier work on this stream:
    for a frame of all running jobs, each time.
    """
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy(Generic[T]):
    """A copy on the host of a tensor's values at `start`, with a `record` of what the values belong to."""

    def __init__(self, tensor: Tensor, record: T) -> None:
        """Allocate the host memory. Do so before the values are computed: a failure would lose them."""
        self.record = record
        self._tensor = tensor
        self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._event = torch.cuda.Event() if tensor.is_cuda else None

    def start(self) -> None:
        """Begin to copy. The tensor may change as soon as this returns."""
        self._value.copy_(self._tensor, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def ready(self) -> bool:
        """True if `wait` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
