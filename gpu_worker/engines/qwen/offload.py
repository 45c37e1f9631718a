"""Where an engine's tensors are: on the device, or, weights alone, in host memory.

It owns the moving and the counting. Tensors keep their identity: whoever holds one sees it come and go.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.base import Memory

BLOCK_BYTES: Final = 32 << 20
"""Host memory is taken in blocks of this size, and copied a block at a time.

torch rounds pinned memory up to a power of two, a third more for a 1.7B model in one piece,
and keeps what is freed: blocks of one such size fit the next model as well.
A block takes 1.3 ms at 25 GB/s, and small copies of those who speak get in between.
"""


class WeightOffloader:
    """Moves weights to the host and back, bit for bit; scratch memory is freed, and comes back as zeros.

    It empties and refills the tensors' storages, so tensors and views of them stay what they are.
    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        scratch: Mapping[str, Iterable[Tensor]],
        device: torch.device,
        *,
        stream: torch.cuda.Stream | None = None,
        others: Sequence[Callable[[], Mapping[str, int]]] = (),
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """`scratch`: tensors by purpose, whose values nobody needs while no job is admitted.

        `stream`: where copies run on CUDA, beside those who speak.
        `others` tell what else the engine holds on the device, in bytes by purpose.
        `closed` is called once everything is freed.
        """
        weights = list(weights)
        self._device = device
        self._stream = stream
        self._others = others
        self._closed = closed
        self._scratch = {purpose: _storages(tensors) for purpose, tensors in scratch.items()}
        held = {storage.data_ptr() for storages in self._scratch.values() for storage, _ in storages}
        self._weights = [(storage, size) for storage, size in _storages(weights) if storage.data_ptr() not in held]
        packed = {id(tensor): tensor.numel() * tensor.element_size() for tensor in weights if tensor.is_mkldnn}
        self._weight_bytes = sum(packed.values()) + sum(size for _, size in self._weights)
        self._host: list[Tensor] = []
        self._resident = True

    def offload(self) -> None:
        """Weights go to the host (pinned, on CUDA); on CPU they are there already.

        Does nothing where they are gone already, as after a restore that failed: the host's copy is the only one then.
        """
        if not self._resident:
            return
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                host = offload_bytes([_bytes(storage) for storage, _ in self._weights], pinned=True)
            self._stream.synchronize()
            self._host = host
            _shrink(self._weights)
        for storages in self._scratch.values():
            _shrink(storages)
        self._resident = False

    def restore(self) -> None:
        """Bring everything back; where it raises, torch's out-of-memory error say, everything is still on the host."""
        storages = [item for items in self._scratch.values() for item in items]
        moved = self._weights if self._device.type == "cuda" else []
        try:
            # What is allocated here was freed on this stream, or is new: nobody else's work on it is under way.
            with torch.cuda.stream(self._stream):
                for storage, size in (*storages, *moved):
                    storage.resize_(size)
                for storage, _ in storages:
                    _bytes(storage).zero_()
                restore_bytes(self._host, [_bytes(storage) for storage, _ in moved])
            if self._stream is not None:
                self._stream.synchronize()
        except BaseException:
            _shrink(storages)
            _shrink(moved)
            raise
        self._host = []
        self._resident = True

    def close(self) -> None:
        """Free everything for good."""
        for storages in (self._weights, *self._scratch.values()):
            _give_up(storages)
        self._weights = []
        self._scratch = {}
        self._host = []
        if self._device.type == "cuda":
            torch._C._host_emptyCache()  # noqa: SLF001 -- torch keeps pinned memory for itself, and has no public word for this on CUDA
        self._weight_bytes = 0
        self._closed()

    def memory(self, **others: int) -> Memory:
        """Bytes by place and purpose; `others`: what else is held on the device."""
        found = dict(others)
        for told in self._others:
            for purpose, size in told().items():
                found[purpose] = found.get(purpose, 0) + size
        held = {purpose: sum(size for _, size in storages) for purpose, storages in self._scratch.items()}
        held = {purpose: size for purpose, size in (held | found if self._resident else found).items() if size}
        weights = {"weights": self._weight_bytes} if self._weight_bytes else {}
        if self._resident:
            return Memory(device=weights | held)
        if self._device.type == "cpu":
            return Memory(host=weights | held)
        if self._host:
            weights = {"weights": sum(block.nbytes for block in self._host)}
        return Memory(device=held, host=weights)


def release_storage(tensors: Iterable[Tensor]) -> None:
    """Give up the memory of tensors that nobody will use again, whoever still holds them.

    What numpy has seen (weights on CPU, as they were read) cannot be taken from its holders, and goes with the last.
    """
    _give_up(_storages(tensors))


def offload_bytes(parts: Sequence[Tensor], *, pinned: bool, block_bytes: int = BLOCK_BYTES) -> list[Tensor]:
    """Begin to copy `parts` (uint8, of one dimension), one behind the other, into blocks of `block_bytes`.

    The last block is the smallest power of two that holds the rest.
    """
    whole, rest = divmod(sum(len(part) for part in parts), block_bytes)
    sizes = [block_bytes] * whole + ([1 << (rest - 1).bit_length()] if rest else [])
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    for block, part in _pieces(blocks, parts, block_bytes):
        block.copy_(part, non_blocking=True)
    return blocks


def restore_bytes(blocks: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Begin to copy back into `parts` what `offload_bytes` made of them."""
    for block, part in _pieces(blocks, parts, len(blocks[0]) if blocks else 0):
        part.copy_(block, non_blocking=True)


def _pieces(blocks: Sequence[Tensor], parts: Sequence[Tensor], block_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What lies where: pieces of a block, and of the part that they belong to."""
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
    """Each storage once, with its bytes; packed weights have none."""
    found = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    return [(storage, storage.nbytes()) for storage in {storage.data_ptr(): storage for storage in found}.values()]


def _give_up(storages: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    _shrink(item for item in storages if item[0].resizable())


def _shrink(storages: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    for storage, _ in storages:
        storage.resize_(0)
