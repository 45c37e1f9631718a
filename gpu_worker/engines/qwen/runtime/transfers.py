"""Values on their way between the host and the device, without waiting for them.

It owns the pinned copies and the event that tells when one is complete. On CPU a copy is complete at once.
"""

from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as int64 [numbers], on their way to the device.

    From memory that is not pinned, they would wait for all that the device has still to do on this stream:
    a frame of those who speak, each time.
    """
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy(Generic[T]):
    """A tensor's values as they were at `start`, and a record of what they are for."""

    def __init__(self, tensor: Tensor, record: T) -> None:
        """Take the host memory, before the values are made: making them again would not give the same."""
        self.record = record
        self._tensor = tensor
        self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._event = torch.cuda.Event() if tensor.is_cuda else None

    def start(self) -> None:
        """Start to copy; the tensor may change as soon as this returns."""
        self._value.copy_(self._tensor, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
