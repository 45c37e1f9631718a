"""Zeros that take no memory before they are written, as far as the system allows: those of a CPU's caches.

torch writes zeros into new memory, and so takes all of it: 3.7 GB for the keys and values of 8 slots of a 0.6B model.
Owns this one operation.
"""

import ctypes
import mmap
from typing import Final

import torch
from torch import Tensor

_SMALL_PAGES: Final = getattr(mmap, "MADV_NOHUGEPAGE", None)
_FORGET: Final = getattr(mmap, "MADV_DONTNEED", None)


def lazy_zeros(like: Tensor, *size: int) -> Tensor:
    """Zeros with the device and dtype of `like`."""
    if like.device.type != "cpu":
        return like.new_zeros(size)
    tensor = like.new_empty(size)
    zero_lazily(tensor.view(-1).view(torch.uint8))
    return tensor


def zero_lazily(memory: Tensor) -> None:
    """Make `memory` zeros: uint8 [bytes]. On a CPU, whole pages go back to the system, which makes them again as zeros.

    Pages of 2 MiB would be taken whole for the first token of each slot and layer, so small ones are asked for.
    """
    begin = -memory.data_ptr() % mmap.PAGESIZE
    size = (len(memory) - begin) // mmap.PAGESIZE * mmap.PAGESIZE
    if memory.device.type != "cpu" or size <= 0 or not _give_back(memory.data_ptr() + begin, size):
        memory.zero_()
        return
    memory[:begin].zero_()
    memory[begin + size :].zero_()


def _give_back(address: int, size: int) -> bool:
    """True if the system took these pages; they are zeros then."""
    if _FORGET is None or _SMALL_PAGES is None:  # not Linux, whose promise of zeros this needs
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise(address, size, _SMALL_PAGES)  # fails on a kernel without huge pages, where nothing is to be done
    return bool(advise(address, size, _FORGET) == 0)
