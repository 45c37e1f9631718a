"""Fake drivers of a device: NVML, torch, and one with a fixed reading."""

from types import SimpleNamespace
from typing import Any

from gpu_worker.residency.host_ram import Usage

UUIDS = [b"GPU-11112222-aaaa", b"GPU-33334444-bbbb", b"GPU-33335555-cccc"]


class FakeDriver:
    """A CUDA driver with a fixed reading."""

    kind = "cuda"

    def __init__(self, usage: Usage) -> None:
        self.usage = usage

    def start(self) -> None:
        """Nothing to start."""

    def name(self) -> str:
        """Its name."""
        return "a fake GPU"

    def read(self) -> Usage:
        """The reading."""
        return self.usage


class FakeNvml:
    """pynvml with three devices, whose handles are their numbers, and one process, which may be ours.

    `trouble` names a function that raises. A device of another id is an instance of one (MIG).
    """

    class NVMLError(Exception):
        """The error of pynvml."""

    def __init__(self, pid: int = 1, used_by_pid: int | None = 1, *, trouble: str = "", mig: bool = False) -> None:
        self.process = SimpleNamespace(pid=pid, usedGpuMemory=used_by_pid)
        self._trouble = trouble
        self._mig = mig
        self.used = 700
        self.cuda = 12040
        self.asked: int | str | None = None

    def __getattribute__(self, name: str) -> Any:
        """The function named by `trouble` raises."""
        value = object.__getattribute__(self, name)
        if name.startswith("nvml") and name == self._trouble:
            raise self.NVMLError(name)
        return value

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's name
        """Nothing to start."""

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802 -- NVML's name
        """`cuda`."""
        return self.cuda

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802 -- NVML's name
        """Older versions give bytes."""
        return b"550.54.15"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 -- NVML's name
        """Three."""
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 -- NVML's name
        """Its number."""
        if index >= len(UUIDS):
            raise self.NVMLError("not found")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 -- NVML's name
        """An instance of a device, by its id; NVML wants the whole of it."""
        if not uuid.startswith("MIG-"):
            raise self.NVMLError("not found")
        return uuid

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802 -- NVML's name
        """Older versions give bytes."""
        return UUIDS[handle]

    def nvmlDeviceGetName(self, _handle: int | str) -> bytes:  # noqa: N802 -- NVML's name
        """Older versions give bytes."""
        return b"NVIDIA Fake"

    def nvmlDeviceGetCudaComputeCapability(self, _handle: int | str) -> list[int]:  # noqa: N802 -- NVML's name
        """An A10."""
        return [8, 6]

    def nvmlDeviceGetMigMode(self, handle: int | str) -> list[int]:  # noqa: N802 -- NVML's name
        """Whether it is partitioned; an instance has no such mode."""
        if isinstance(handle, str):
            raise self.NVMLError("invalid argument")
        return [int(self._mig), int(self._mig)]

    def nvmlDeviceGetMemoryInfo(self, handle: int | str) -> Any:  # noqa: N802 -- NVML's name
        """One reading; note of which."""
        self.asked = handle
        return SimpleNamespace(total=1000, used=self.used, free=1000 - self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: int | str) -> list[Any]:  # noqa: N802 -- NVML's name
        """One process."""
        return [self.process]


class FakeTorch:
    """The part of torch that the probe uses, with one reading.

    Starting it makes a context on the device of `nvml`.
    """

    CONTEXT = 44

    class OutOfMemoryError(RuntimeError):
        """The error of torch."""

    def __init__(self, nvml: FakeNvml | None = None) -> None:
        self.cuda = self
        self.calls: list[str] = []
        self.available = True
        self.reserved = 60
        self._nvml = nvml

    def is_available(self) -> bool:
        """As told."""
        return self.available

    def is_initialized(self) -> bool:
        """Without a device to be started on, CUDA has been started."""
        return self._nvml is None

    def init(self) -> None:
        """CUDA starts."""
        if self._nvml is not None:
            self._nvml.used += self.CONTEXT
            self._nvml = None

    def memory_reserved(self) -> int:
        """The bytes that the allocator holds."""
        return self.reserved

    def mem_get_info(self) -> tuple[int, int]:
        """Free and total."""
        return 30, 100

    def get_device_name(self) -> str:
        """The device's name."""
        return "Fake 4000"

    def synchronize(self) -> None:
        """Note it."""
        self.calls.append("synchronize")

    def empty_cache(self) -> None:
        """Note it."""
        self.calls.append("empty_cache")
