"""Zeros that take memory when they are written."""

import mmap
from pathlib import Path

import pytest
import torch

from gpu_worker.engines.qwen.runtime import lazy_zeros as module
from gpu_worker.engines.qwen.runtime.lazy_zeros import lazy_zeros, zero_lazily


def resident_bytes() -> int:
    """The host RAM of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_zeros_take_memory_when_they_are_written() -> None:
    """A page for each place that is written, and none for what is read."""
    size = 512 << 20
    before = resident_bytes()
    zeros = lazy_zeros(torch.empty(0), size >> 2)
    assert not zeros[:: 1 << 20].any()
    for place in range(0, len(zeros), 16 << 20):
        zeros[place] = 1
    assert resident_bytes() - before < size >> 3
    assert int(zeros.count_nonzero()) == 8
    del zeros


@pytest.mark.parametrize("size", [0, 1, mmap.PAGESIZE - 1, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 5, 1 << 22])
@pytest.mark.parametrize("system", [True, False])
def test_all_bytes_are_zero(monkeypatch: pytest.MonkeyPatch, *, size: int, system: bool) -> None:
    """Those before the first whole page and behind the last one, too, and those of a system that gives nothing back."""
    if not system:
        monkeypatch.setattr(module, "_FORGET", None)
    memory = torch.full((size + 300,), 7, dtype=torch.uint8)
    part = memory[100 : 100 + size]
    zero_lazily(part)
    assert not part.any()
    assert (memory[:100] == 7).all()
    assert (memory[100 + size :] == 7).all()
    assert lazy_zeros(torch.empty(0, dtype=torch.bfloat16), 2, 3).tolist() == [[0.0] * 3] * 2
