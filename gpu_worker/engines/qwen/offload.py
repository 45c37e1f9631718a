"""Offloading: an engine's weights go to host memory and back, its scratch memory is freed and allocated again.

Owns these moves and the count of the bytes. Tensors keep their identity: every reference to one stays valid.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.base import Memory
from gpu_worker.engines.qwen.runtime.lazy_zeros import zero_lazily

BLOCK_BYTES: Final = 32 << 20
"""Host memory is allocated in blocks of this size, and copied block by block.

torch rounds pinned memory up to a power of two: in one piece, a 1.7B model would take a third more.
It also keeps freed memory, and blocks of one size fit the next model as well.
A block takes 1.3 ms at 25 GB/s; between two blocks, small copies of running jobs get their turn.
"""


class WeightOffloader:
    """Moves weights to the host and back, bit for bit; scratch memory is freed, and comes back as zeros.

    It resizes the tensors' storages to 0 bytes and back, so tensors and views of them stay valid.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        scratch: Mapping[str, Iterable[Tensor]],
        device: torch.device,
        *,
        hidden_bytes: int = 0,
        stream: torch.cuda.Stream | None = None,
        extra_memory: Sequence[Callable[[], Mapping[str, int]]] = (),
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`scratch`: tensors by purpose, whose values are not needed while the engine has no job.

        `hidden_bytes`: what of the weights on a CPU is in memory that no tensor counts.
        `stream`: where copies run on CUDA, beside the running jobs of other engines.
        `extra_memory` return what else the engine holds on the device, bytes by purpose.
        `on_close` is called once everything is freed.
        """
        weights = list(weights)
        self._device = device
        self._stream = stream
        self._extra_memory = extra_memory
        self._on_close = on_close
        self._scratch = {purpose: _storages(tensors) for purpose, tensors in scratch.items()}
        scratch_pointers = {storage.data_ptr() for items in self._scratch.values() for storage, _ in items}
        self._weights = [item for item in _storages(weights) if item[0].data_ptr() not in scratch_pointers]
        packed = {id(tensor): tensor.numel() * tensor.element_size() for tensor in weights if tensor.is_mkldnn}
        self._weight_bytes = hidden_bytes + sum(packed.values()) + sum(size for _, size in self._weights)
        self._host: list[Tensor] = []
        self._resident = True

    def offload(self) -> None:
        """Move the weights to pinned host memory (on CPU they stay where they are), and free scratch memory.

        Does nothing if this is done already, as after a failed restore: the host's copy is then the only one.
        """
        if not self._resident:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host = offload_bytes([_bytes(storage) for storage, _ in self._weights], pinned=True)
            self._stream.synchronize()
            self._host = host
            _free(self._weights)
        for storages in self._scratch.values():
            _free(storages)
        self._resident = False

    def restore(self) -> None:
        """Move the weights back, and allocate scratch memory.

        Raises:
            torch.OutOfMemoryError: there is not enough memory. After any error, everything is as it was before.
        """
        storages = [item for items in self._scratch.values() for item in items]
        moved = self._weights if self._device.type == "cuda" else []
        try:
            # Memory allocated here was freed on this stream, or is new: no work of another stream still uses it.
            with torch.cuda.stream(self._stream):
                for storage, size in (*storages, *moved):
                    storage.resize_(size)
                for storage, _ in storages:
                    zero_lazily(_bytes(storage))
                restore_bytes(self._host, [_bytes(storage) for storage, _ in moved])
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException:
            _free(storages)
            _free(moved)
            raise
        self._host = []
        self._resident = True

    def close(self) -> None:
        """Free everything for good."""
        for storages in (self._weights, *self._scratch.values()):
            _free(storages)
        self._weights = []
        self._scratch = {}
        self._host = []
        if self._device.type == "cuda":
            torch._C._host_emptyCache()  # noqa: SLF001 -- no public way to return torch's cache of pinned memory
        self._weight_bytes = 0
        self._on_close()

    def memory(self, **extra: int) -> Memory:
        """Bytes by place and purpose; `extra`: what else the engine holds on the device."""
        weights = Counter(weights=sum(block.nbytes for block in self._host) or self._weight_bytes)
        held = Counter(extra)
        for purpose, storages in self._scratch.items() if self._resident else ():
            held[purpose] = sum(size for _, size in storages)
        for memory in self._extra_memory:
            held.update(memory())
        if not self._resident and self._device.type == "cuda":
            return Memory(device=dict(+held), host=dict(+weights))
        together = dict(+(weights + held))
        return Memory(device=together) if self._resident else Memory(host=together)


def release_storage(tensors: Iterable[Tensor]) -> None:
    """Free the memory of tensors that are no longer used, even if references to them remain.

    Memory shared with numpy (weights on CPU, as they were read) is freed with its last reference instead.
    """
    _free(_storages(tensors))


def offload_bytes(parts: Sequence[Tensor], *, pinned: bool, block_bytes: int = BLOCK_BYTES) -> list[Tensor]:
    """Begin to copy `parts` (uint8 [bytes]), one behind the other, into host blocks of `block_bytes`.

    The last block is the smallest power of two that holds the rest.
    """
    whole, rest = divmod(sum(len(part) for part in parts), block_bytes)
    sizes = [block_bytes] * whole + ([1 << (rest - 1).bit_length()] if rest else [])
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    for block, part in _pieces(blocks, parts, block_bytes):
        block.copy_(part, non_blocking=True)
    return blocks


def restore_bytes(blocks: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Begin to copy the blocks of `offload_bytes` back into `parts`."""
    for block, part in _pieces(blocks, parts, len(blocks[0]) if blocks else 0):
        part.copy_(block, non_blocking=True)


def _pieces(blocks: Sequence[Tensor], parts: Sequence[Tensor], block_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Each run of bytes that lies in one block and in one part: its views of both."""
    at = 0
    for part in parts:
        start = 0
        while start < len(part):
            number, offset = divmod(at, block_bytes)
            length = min(len(part) - start, block_bytes - offset)
            yield blocks[number][offset : offset + length], part[start : start + length]
            start += length
            at += length


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Each storage once, with its bytes. Packed weights have no storage."""
    found = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    return [(storage, storage.nbytes()) for storage in {storage.data_ptr(): storage for storage in found}.values()]


def _free(storages: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    for storage, _ in storages:
        if storage.resizable():  # memory shared with numpy is not
            storage.resize_(0)
