"""Values on their way from the device to the host, without waiting for them.

It owns the pinned copy and the event that tells when it is complete. On CPU a value is simply there.
"""

from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Readback(Generic[T]):
    """A tensor's values as they are now, and a note of what they are for."""

    def __init__(self, tensor: Tensor, note: T) -> None:
        """Start to copy; `tensor` may change as soon as this returns."""
        self.note = note
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._value = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._value.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._value = tensor.clone()

    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """The values, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._value
