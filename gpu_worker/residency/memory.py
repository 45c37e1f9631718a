"""The memory probe: the device's memory, host RAM, and the budgets of both.

Figures are the driver's and the kernel's, never sums of what should be there.
Reading never starts CUDA: where NVML answers, torch is not even imported.
"""

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from gpu_worker.residency.host_ram import CpuDriver, Usage, read_ram, trim_host
from gpu_worker.residency.nvidia import NvmlDriver, TorchDriver, nvml_driver
from shared.protocol import DeviceMemory, HostMemory

MIN_RESERVE_BYTES: Final = 512 * 2**20
RESERVE_SHARE: Final = 0.05
"""The reserve of a default budget: this share of the total, at least MIN_RESERVE_BYTES, at most half of the rest."""


MemoryDriver = CpuDriver | NvmlDriver | TorchDriver
"""Measures one device. Each has a `kind`, `name()`, `start()` and `read()`, callable from any thread."""


class MemoryProbe:
    """Measures the device through `driver`, and host RAM. Callable from any thread.

    A budget of None is what this process holds plus what is free, less a reserve, at every reading:
    it follows other processes that come and go.
    The host's default budget is set at start: the kernel does not count pinned memory as this process's.
    """

    def __init__(
        self,
        driver: MemoryDriver,
        *,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        ram: Callable[[], Usage] = read_ram,
    ) -> None:
        self._driver = driver
        self._name = driver.name()
        # In CPU mode the interpreter and its libraries, all that is there at the start, are not held by models.
        self._base_bytes = driver.read().ours_bytes if driver.kind == "cpu" else 0
        self._ram = ram
        self._moving_thread: int | None = None
        self._default_host_budget_bytes = default_budget(ram(), 0)
        self.set_budgets(budget_bytes, host_budget_bytes)

    def set_budgets(self, budget_bytes: int | None, host_budget_bytes: int | None) -> None:
        """Use other budgets from now on; None is the default one."""
        self._budget_bytes = budget_bytes
        self._host_budget_bytes = self._default_host_budget_bytes if host_budget_bytes is None else host_budget_bytes

    def start(self) -> None:
        """Start CUDA in this process if torch is imported, and measure what its context takes of the device.

        Call it before the first engine is opened: NVML does not list every process's memory everywhere.
        """
        self._driver.start()

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """While this thread moves a model, no other one may reclaim memory."""
        self._moving_thread = threading.get_ident()
        try:
            yield
        finally:
            self._moving_thread = None

    def device(self) -> DeviceMemory:
        """The device's memory now."""
        usage = self._driver.read()
        budget_bytes = self._budget_bytes
        if budget_bytes is None:
            budget_bytes = default_budget(usage, max(0, usage.ours_bytes - self._base_bytes))
        return DeviceMemory(
            name=self._name,
            kind=self._driver.kind,
            others_bytes=max(0, usage.used_bytes - usage.ours_bytes),
            budget_bytes=budget_bytes,
            **msgspec.structs.asdict(usage),
        )

    def host(self) -> HostMemory:
        """Host RAM now. `offloaded_bytes` is 0: Residency knows that part, not the probe."""
        ram = self._ram()
        return HostMemory(
            total_bytes=ram.total_bytes,
            free_bytes=ram.free_bytes,
            ours_bytes=ram.ours_bytes,
            offloaded_bytes=0,
            budget_bytes=self._host_budget_bytes,
        )

    def reclaim(self, *, collect: bool) -> None:
        """Return freed memory to the driver and the system; with `collect`, collect garbage first.

        A collection stops every thread of the process: 250 ms were measured with torch and transformers imported
        (2 cores), 0 after gc.freeze.

        Raises:
            RuntimeError: another thread moves a model. Waiting for the device would break its capture of graphs.
        """
        if self._moving_thread not in (None, threading.get_ident()):
            raise RuntimeError("memory is reclaimed while a model is moved")
        trim_host(collect=collect)
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def open_probe(kind: str, *, budget_bytes: int | None = None, host_budget_bytes: int | None = None) -> MemoryProbe:
    """The probe of "cuda" (the first visible device) or "cpu"; for budgets see MemoryProbe."""
    driver: MemoryDriver = CpuDriver()
    if kind == "cuda":
        driver = nvml_driver() or TorchDriver(importlib.import_module("torch"))
    return MemoryProbe(driver, budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)


def default_budget(usage: Usage, held_bytes: int) -> int:
    """The budget when none is configured: `held_bytes` plus what is free, less a reserve for other processes."""
    reserve = max(MIN_RESERVE_BYTES, int(usage.total_bytes * RESERVE_SHARE))
    most = held_bytes + usage.free_bytes
    return most - min(reserve, most // 2)
