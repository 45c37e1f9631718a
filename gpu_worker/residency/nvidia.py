"""NVIDIA devices: which one CUDA will use, and its memory as the driver tells it.

NVML answers without starting CUDA; torch is asked only where the driver has no NVML.
"""

import ctypes
import importlib
import os
import sys
from typing import Any, Protocol

from gpu_worker.residency.host_ram import Usage


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


def cuda_present() -> bool:
    """Whether there is a GPU that this process may use, as NVML says, or else torch.

    NVML does not say that torch was built for it. torch is imported only where CUDA's driver is installed without NVML.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in {"", "-1"}:
        return False
    if nvml_driver() is not None:
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
        torch = importlib.import_module("torch")
    except (OSError, ImportError):
        return False
    return bool(torch.cuda.is_available())


def nvml_driver() -> NvmlDriver | None:
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
