"""Where an engine's tensors are: on the device, or, weights alone, in host memory.

It owns the moving and the counting. Tensors keep their identity: whoever holds one sees it come and go.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gpu_worker.engines.base import Memory


class Residence:
    """Moves weights to the host and back, bit for bit; scratch memory is freed, and comes back as zeros.

    It empties and refills the tensors' storages, so tensors and views of them stay what they are.
    """

    def __init__(
        self, weights: Iterable[Tensor], scratch: Mapping[str, Iterable[Tensor]], device: torch.device
    ) -> None:
        """`scratch`: tensors by purpose, whose values nobody needs while no job is admitted."""
        weights = list(weights)
        self._device = device
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
        if self._device.type == "cuda":
            for storage, size in self._weights:
                host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                self._host.append(host.copy_(self._bytes(storage), non_blocking=True))
            torch.cuda.synchronize(self._device)
            _shrink(self._weights)
        for storages in self._scratch.values():
            _shrink(storages)
        self._resident = False

    def restore(self) -> None:
        """Bring everything back; raises torch's out-of-memory error with everything still on the host."""
        storages = [item for items in self._scratch.values() for item in items]
        moved = self._weights if self._device.type == "cuda" else []
        try:
            for storage, size in (*storages, *moved):
                storage.resize_(size)
        except BaseException:
            _shrink(storages)
            _shrink(moved)
            raise
        for storage, _ in storages:
            self._bytes(storage).zero_()
        for (storage, _), host in zip(moved, self._host, strict=True):
            self._bytes(storage).copy_(host, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._host.clear()
        self._resident = True

    def close(self) -> None:
        """Free everything for good."""
        for storages in (self._weights, *self._scratch.values()):
            _shrink(storages)
        self._weights = []
        self._scratch = {}
        self._host.clear()
        if self._device.type == "cuda":
            torch._C._host_emptyCache()  # noqa: SLF001 -- torch keeps pinned memory for itself, and has no public word for this on CUDA
        self._weight_bytes = 0

    def memory(self, **others: int) -> Memory:
        """Bytes by place and purpose; `others`: what else is held on the device."""
        held = {purpose: sum(size for _, size in storages) for purpose, storages in self._scratch.items()}
        held = {purpose: size for purpose, size in (held | others if self._resident else others).items() if size}
        weights = {"weights": self._weight_bytes} if self._weight_bytes else {}
        if self._resident:
            return Memory(device=weights | held)
        return Memory(device=held, host=weights)

    def _bytes(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)


def _storages(tensors: Iterable[Tensor]) -> list[tuple[torch.UntypedStorage, int]]:
    """Each storage once, with its bytes; packed weights have none."""
    found = [tensor.untyped_storage() for tensor in tensors if not tensor.is_mkldnn]
    return [(storage, storage.nbytes()) for storage in {storage.data_ptr(): storage for storage in found}.values()]


def _shrink(storages: Iterable[tuple[torch.UntypedStorage, int]]) -> None:
    for storage, _ in storages:
        storage.resize_(0)
