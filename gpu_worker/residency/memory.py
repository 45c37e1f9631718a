"""The memory probe: the device's memory, host RAM, and the budgets of both.

Figures are the driver's and the kernel's, never sums of what should be there.
Reading never starts CUDA: where NVML answers, torch is not even imported.
"""

import importlib
import sys
from pathlib import Path
from typing import Final, Literal, Protocol

from gpu_worker.residency.host_ram import CGROUP, PROC, Usage, read_ram, trim_host
from gpu_worker.residency.nvidia import CudaDriver, TorchDriver, nvml_driver
from shared.protocol import DeviceMemory, HostMemory

MIN_RESERVE_BYTES: Final = 512 * 2**20
RESERVE_SHARE: Final = 0.05
"""What the default budget leaves to others: this share of the total, MIN_RESERVE_BYTES at least, half of what could be
taken at most."""


class MemoryProbe(Protocol):
    """Measures memory. Callable from any thread."""

    def device(self) -> DeviceMemory:
        """The device's memory now."""
        ...

    def host(self) -> HostMemory:
        """Host RAM now; what offloaded models hold of it is not the probe's to know and 0."""
        ...

    def reclaim(self, *, collect: bool) -> None:
        """Give memory that was freed back to the driver and the system, and before that `collect` garbage.

        Collecting stops every thread of the process for as long as it takes:
        250 ms were measured with torch and transformers imported (2 cores), 0 where they had been frozen (gc.freeze).
        """
        ...


class CpuProbe:
    """The device is the CPU: its memory is the RAM.

    The default budget counts what this process has grown by since the start as held by models.
    """

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        proc: Path = PROC,
        cgroup: Path = CGROUP,
    ) -> None:
        self._proc = proc
        self._cgroup = cgroup
        self._budget_bytes = budget_bytes
        at_start = read_ram(proc, cgroup)
        self._ours_at_start = at_start.ours_bytes
        self._host_budget_bytes = default_budget(at_start, 0) if host_budget_bytes is None else host_budget_bytes

    def start(self) -> None:
        """There is nothing to start."""

    def device(self) -> DeviceMemory:
        """The RAM, `ours_bytes` being what this process has resident."""
        ram = read_ram(self._proc, self._cgroup)
        budget_bytes = self._budget_bytes
        if budget_bytes is None:
            budget_bytes = default_budget(ram, max(0, ram.ours_bytes - self._ours_at_start))
        return _device("CPU", "cpu", ram, budget_bytes)

    def host(self) -> HostMemory:
        """The RAM."""
        return _host(read_ram(self._proc, self._cgroup), self._host_budget_bytes)

    def reclaim(self, *, collect: bool) -> None:
        """Give freed memory back to the system."""
        trim_host(collect=collect)


class CudaProbe:
    """The device is a CUDA GPU; what `driver` says of it is believed.

    The default budget is what this process holds and what is free, less a reserve, at every reading:
    it follows the neighbours that come and go.
    That of the host is made at the start: the kernel does not count pinned memory as this process's.
    """

    def __init__(
        self,
        driver: CudaDriver,
        *,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        proc: Path = PROC,
        cgroup: Path = CGROUP,
    ) -> None:
        self._driver = driver
        self._proc = proc
        self._cgroup = cgroup
        self._name = driver.name()
        self._budget_bytes = budget_bytes
        default_host = default_budget(read_ram(proc, cgroup), 0)
        self._host_budget_bytes = default_host if host_budget_bytes is None else host_budget_bytes

    def start(self) -> None:
        """Start CUDA in this process, where torch is imported, and note what its context takes of the device.

        To be called before the first engine is opened: NVML does not tell what each process holds everywhere.
        """
        self._driver.start()

    def device(self) -> DeviceMemory:
        """The GPU's memory."""
        usage = self._driver.read()
        budget_bytes = self._budget_bytes
        if budget_bytes is None:
            budget_bytes = default_budget(usage, usage.ours_bytes)
        return _device(self._name, "cuda", usage, budget_bytes)

    def host(self) -> HostMemory:
        """The RAM."""
        return _host(read_ram(self._proc, self._cgroup), self._host_budget_bytes)

    def reclaim(self, *, collect: bool) -> None:
        """Give the allocator's unused blocks back to the driver, and freed memory to the system."""
        trim_host(collect=collect)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def open_probe(
    kind: str, *, budget_bytes: int | None = None, host_budget_bytes: int | None = None
) -> CpuProbe | CudaProbe:
    """The probe of "cuda" (the first visible device) or "cpu".

    A budget of None is what is free less a reserve, and what is held already.
    """
    if kind == "cpu":
        return CpuProbe(budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)
    driver = nvml_driver() or TorchDriver(importlib.import_module("torch"))
    return CudaProbe(driver, budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)


def default_budget(usage: Usage, held_bytes: int) -> int:
    """What may be held of a memory when no budget is set: `held_bytes`, and what is free but a reserve for others."""
    reserve = max(MIN_RESERVE_BYTES, int(usage.total_bytes * RESERVE_SHARE))
    most = held_bytes + usage.free_bytes
    return most - min(reserve, most // 2)


def _device(name: str, kind: Literal["cuda", "cpu"], usage: Usage, budget_bytes: int) -> DeviceMemory:
    return DeviceMemory(
        name=name,
        kind=kind,
        total_bytes=usage.total_bytes,
        used_bytes=usage.used_bytes,
        free_bytes=usage.free_bytes,
        ours_bytes=usage.ours_bytes,
        others_bytes=max(0, usage.used_bytes - usage.ours_bytes),
        budget_bytes=budget_bytes,
    )


def _host(usage: Usage, budget_bytes: int) -> HostMemory:
    return HostMemory(
        total_bytes=usage.total_bytes,
        free_bytes=usage.free_bytes,
        ours_bytes=usage.ours_bytes,
        offloaded_bytes=0,
        budget_bytes=budget_bytes,
    )
