"""The only reader of memory, the device's and the host's, and what gives freed memory back to its owner.

Figures are the driver's and the kernel's, never sums of what should be there.
Reading never starts CUDA: where NVML answers, torch is not even imported.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from shared.protocol import DeviceMemory, HostMemory

MIN_RESERVE_BYTES: Final = 512 * 2**20
RESERVE_SHARE: Final = 0.05
"""What the default budget leaves to others: this share of the total, MIN_RESERVE_BYTES at least, half of what could be
taken at most."""

_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")
_KIB: Final = 1024


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


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one memory, in bytes; `ours_bytes` is this process's part."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int


class CpuProbe:
    """The device is the CPU: its memory is the RAM.

    The default budget counts what this process has grown by since the start as held by models.
    """

    def __init__(
        self,
        *,
        budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
        proc: Path = _PROC,
        cgroup: Path = _CGROUP,
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


class CudaDriver(Protocol):
    """Who tells about a CUDA device."""

    def start(self) -> None:
        """See CudaProbe."""
        ...

    def name(self) -> str:
        """What the device is called."""
        ...

    def read(self) -> Usage:
        """Its memory now."""
        ...


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
        proc: Path = _PROC,
        cgroup: Path = _CGROUP,
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


class NvmlDriver:
    """NVIDIA's management library: no CUDA context, the same figures as nvidia-smi.

    `nvml` is the module pynvml, `visible` the value of CUDA_VISIBLE_DEVICES: its first entry is the device.
    NVML counts devices in the order of the PCI bus; CUDA does so with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    Raises pynvml's NVMLError where it knows no such device.
    """

    def __init__(self, nvml: Any, visible: str | None) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._handle = self._find((visible or "0").split(",")[0].strip())
        self._context_bytes = 0

    @property
    def partitioned(self) -> bool:
        """Whether CUDA will use but an instance of the device (MIG), where the figures here are those of the whole."""
        try:
            current, _pending = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except self._nvml.NVMLError:
            return False  # a device that cannot be partitioned, or an instance itself
        return bool(current)

    def start(self) -> None:
        """See CudaProbe."""
        torch = sys.modules.get("torch")
        if torch is None or torch.cuda.is_initialized():
            return
        before = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        torch.cuda.init()
        torch.cuda.synchronize()  # the context is made by the first call that needs it
        self._context_bytes = max(0, int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) - before)

    def name(self) -> str:
        """What nvidia-smi calls the device."""
        name = self._nvml.nvmlDeviceGetName(self._handle)
        return name.decode() if isinstance(name, bytes) else str(name)

    def read(self) -> Usage:
        """The device's memory; ours is what torch and its context hold where the driver does not tell."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        listed = self._listed()
        return Usage(
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            free_bytes=int(memory.free),
            ours_bytes=_torch_reserved() + self._context_bytes if listed is None else listed,
        )

    def _find(self, name: str) -> Any:
        """The device that CUDA calls so: by its number, or its id, of a GPU also the first digits."""
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.startswith("GPU-"):
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = self._nvml.nvmlDeviceGetUUID(handle)
                if (uuid.decode() if isinstance(uuid, bytes) else str(uuid)).startswith(name):
                    return handle
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _listed(self) -> int | None:
        """This process's part as NVML lists it; None where it does not.

        WSL 2 and virtual GPUs have no such list, or none with memory;
        in a container processes are listed by their ids outside of it.
        """
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        used = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
        return None if used is None else int(used)


class TorchDriver:
    """torch's own view, where NVML has none. Reading it starts CUDA in this process."""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def start(self) -> None:
        """See CudaProbe; reading has started it."""

    def name(self) -> str:
        """What CUDA calls the device."""
        return str(self._torch.cuda.get_device_name())

    def read(self) -> Usage:
        """The device's memory; ours is what torch has reserved, without the CUDA context."""
        free, total = self._torch.cuda.mem_get_info()
        return Usage(
            total_bytes=int(total),
            used_bytes=int(total - free),
            free_bytes=int(free),
            ours_bytes=int(self._torch.cuda.memory_reserved()),
        )


def open_probe(
    kind: str, *, budget_bytes: int | None = None, host_budget_bytes: int | None = None
) -> CpuProbe | CudaProbe:
    """The probe of "cuda" (the first visible device) or "cpu".

    A budget of None is what is free less a reserve, and what is held already.
    """
    if kind == "cpu":
        return CpuProbe(budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)
    driver = _nvml_driver() or TorchDriver(importlib.import_module("torch"))
    return CudaProbe(driver, budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes)


def cuda_present() -> bool:
    """Whether there is a GPU that this process may use, as NVML says, or else torch.

    NVML does not say that torch was built for it. torch is imported only where CUDA's driver is installed without NVML.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1"}:
        return False
    if _nvml_driver() is not None:
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
        torch = importlib.import_module("torch")
    except (OSError, ImportError):
        return False
    return bool(torch.cuda.is_available())


def default_budget(usage: Usage, held_bytes: int) -> int:
    """What may be held of a memory when no budget is set: `held_bytes`, and what is free but a reserve for others."""
    reserve = max(MIN_RESERVE_BYTES, int(usage.total_bytes * RESERVE_SHARE))
    most = held_bytes + usage.free_bytes
    return most - min(reserve, most // 2)


_OUT_OF_MEMORY: Final = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUFFT_ALLOC_FAILED",
)
"""How torch's plain RuntimeErrors say it: the CPU's allocator, what CUDA itself allocates (pinned memory, graphs),
and the libraries that allocate beside torch. cuBLAS calls itself not initialized where its handle finds no room."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: Python's, CUDA's or the CPU allocator's of torch."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def trim_host(*, collect: bool) -> None:
    """Let the C library return what is free to the system, where it can (glibc); before that `collect` garbage."""
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def read_ram(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Usage:
    """The RAM as /proc and the process's control group (a container's limit) tell it."""
    fields = dict(_fields(proc / "meminfo"))
    total, free = fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB
    # statm counts pages; the second figure is what this process has resident.
    resident_pages = int((proc / "self" / "statm").read_text().split()[1])
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((cgroup / "memory.max").read_text())
        # Files the kernel can forget are counted as used by the group, but are as good as free.
        forgettable = dict(_fields(cgroup / "memory.stat"))["inactive_file"]
        in_use = int((cgroup / "memory.current").read_text()) - forgettable
        total, free = min(total, limit), max(0, min(free, limit - in_use))
    return Usage(
        total_bytes=total,
        used_bytes=total - free,
        free_bytes=free,
        ours_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
    )


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, figure, *_ = line.replace(":", " ").split()
        yield name, int(figure)


def _device(name: str, kind: Any, usage: Usage, budget_bytes: int) -> DeviceMemory:
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


def _nvml_driver() -> NvmlDriver | None:
    """NVML's view of the device that CUDA will use; None where it cannot give one."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        driver = NvmlDriver(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        driver.read()
    except nvml.NVMLError:
        return None  # a machine whose driver has no NVML, or only half of it, still has CUDA
    return None if driver.partitioned else driver


def _torch_reserved() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0
