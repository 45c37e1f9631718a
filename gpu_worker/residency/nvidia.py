"""NVIDIA devices: which one CUDA will use, and its memory as the driver reports it.

NVML answers without starting CUDA. torch is asked only if the driver has no NVML.
"""

import ctypes
import importlib
import importlib.util
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from gpu_worker.residency.host_ram import Usage

LIST_AGE_S: Final = 1.0
"""How old NVML's list of processes may be while torch's part is the same. Some drivers take 5 ms for it.

The synthesis thread reads the memory five times a second for each web worker.
"""

DRIVERS: Final = {12: 525, 13: 580}
"""By the major version of CUDA that torch is built for: the oldest NVIDIA driver for Linux that runs it."""


class NvmlDriver:
    """NVIDIA's management library: no CUDA context, the same figures as nvidia-smi.

    `nvml` is the module pynvml, `visible` the value of CUDA_VISIBLE_DEVICES: its first entry is the device.
    NVML counts devices in the order of the PCI bus; CUDA does so with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    Raises pynvml's NVMLError for an unknown device.
    """

    kind: Literal["cuda", "cpu"] = "cuda"

    def __init__(self, nvml: Any, visible: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._clock = clock
        self._last_list: tuple[float, int, int | None] | None = None
        nvml.nvmlInit()
        self._handle = self._find((visible or "0").split(",")[0].strip())
        self._context_bytes = 0

    @property
    def partitioned(self) -> bool:
        """True if CUDA will use one instance of the device (MIG): NVML's figures are then those of the whole device."""
        try:
            current, _pending = self._nvml.nvmlDeviceGetMigMode(self._handle)
        except self._nvml.NVMLError:
            return False  # a device that cannot be partitioned, or an instance itself
        return bool(current)

    def start(self) -> None:
        """Start CUDA and measure what its context takes."""
        torch = sys.modules.get("torch")
        if torch is None or torch.cuda.is_initialized():
            return
        before = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        torch.cuda.init()
        torch.cuda.synchronize()  # the context is made by the first call that needs it
        self._context_bytes = max(0, int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) - before)

    def name(self) -> str:
        """The name that nvidia-smi shows."""
        name = self._nvml.nvmlDeviceGetName(self._handle)
        return name.decode() if isinstance(name, bytes) else str(name)

    def capability(self) -> tuple[int, int]:
        """The compute capability: (8, 6) is 8.6."""
        major, minor = self._nvml.nvmlDeviceGetCudaComputeCapability(self._handle)
        return int(major), int(minor)

    def read(self) -> Usage:
        """If NVML does not list this process, its part is what torch has reserved plus the CUDA context."""
        memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        listed = self._recently_listed()
        return Usage(
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            free_bytes=int(memory.free),
            ours_bytes=_torch_reserved() + self._context_bytes if listed is None else listed,
        )

    def _find(self, name: str) -> Any:
        """The device of that index or UUID; the beginning of a GPU's UUID is enough, as for CUDA."""
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        if name.startswith("GPU-"):
            for index in range(self._nvml.nvmlDeviceGetCount()):
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = self._nvml.nvmlDeviceGetUUID(handle)
                if (uuid.decode() if isinstance(uuid, bytes) else str(uuid)).startswith(name):
                    return handle
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _recently_listed(self) -> int | None:
        """As `_listed`; at most LIST_AGE_S old, and never older than the last change of what torch has reserved."""
        now, reserved, last = self._clock(), _torch_reserved(), self._last_list
        if last is None or now - last[0] > LIST_AGE_S or reserved != last[1]:
            last = self._last_list = (now, reserved, self._listed())
        return last[2]

    def _listed(self) -> int | None:
        """This process's bytes in NVML's list, or None if it is not in the list.

        WSL 2 and virtual GPUs have no such list, or none with memory; a container's processes appear under other ids.
        """
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        used = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
        return None if used is None else int(used)


class TorchDriver:
    """torch's figures, for devices without NVML. Reading them starts CUDA in this process."""

    kind: Literal["cuda", "cpu"] = "cuda"

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def start(self) -> None:
        """Do nothing: reading starts CUDA."""

    def name(self) -> str:
        """The name that CUDA reports."""
        return str(self._torch.cuda.get_device_name())

    def read(self) -> Usage:
        """This process's part is what torch has reserved, without the CUDA context."""
        free, total = self._torch.cuda.mem_get_info()
        return Usage(
            total_bytes=int(total),
            used_bytes=int(total - free),
            free_bytes=int(free),
            ours_bytes=int(self._torch.cuda.memory_reserved()),
        )


def cuda_present() -> bool:
    """True if this process may use a GPU, according to NVML, or else to torch.

    NVML does not say whether torch was built for CUDA. torch is imported only if CUDA's driver is there without NVML.
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


def cuda_capability() -> tuple[int, int] | None:
    """The compute capability of the device that CUDA will use; None if NVML does not tell it. CUDA is not started."""
    driver = nvml_driver()
    if driver is None:
        return None
    try:
        return driver.capability()
    except importlib.import_module("pynvml").NVMLError:
        return None


def cuda_problem() -> str | None:
    """Why torch cannot use the GPU of this machine, in one sentence; None if it can, or if torch is not installed.

    torch itself would say so at the first load, and nvidia-smi shows nothing wrong. torch is not imported.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    version, cuda = built["__version__"], built["cuda"]
    if cuda is None:
        return f"torch {version} is built without CUDA: install the build for CUDA from pypi.org"
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        supported = int(nvml.nvmlSystemGetCudaDriverVersion_v2())  # 12040 is 12.4
        driver = nvml.nvmlSystemGetDriverVersion()
    except (ImportError, AttributeError):
        return None
    except nvml.NVMLError:
        return None  # such a machine may still have CUDA
    needed = int(cuda.partition(".")[0])
    if supported // 1000 >= needed:  # within a major version every driver runs every torch
        return None
    driver = driver.decode() if isinstance(driver, bytes) else str(driver)
    oldest = f"driver {DRIVERS[needed]} or newer" if needed in DRIVERS else "a newer driver"
    return (
        f"the NVIDIA driver {driver} supports CUDA {supported // 1000}.{supported % 1000 // 10}, "
        f"and torch {version} needs CUDA {cuda}: install {oldest}"
    )


def nvml_driver() -> NvmlDriver | None:
    """NVML for the device that CUDA will use; None if NVML is missing, broken, or would report a whole MIG device."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        driver = NvmlDriver(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        driver.read()
    except nvml.NVMLError:
        return None  # such a machine may still have CUDA
    return None if driver.partitioned else driver


def _torch_reserved() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.memory_reserved()) if torch is not None and torch.cuda.is_initialized() else 0
