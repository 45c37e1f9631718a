"""The readings are the kernel's and the driver's, and what is freed goes back to them."""

import ctypes
import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_worker.residency.memory import (
    MIN_RESERVE_BYTES,
    CpuProbe,
    CudaProbe,
    NvmlDriver,
    TorchDriver,
    Usage,
    cuda_present,
    default_budget,
    is_out_of_memory,
    open_probe,
    read_ram,
)

GIB = 2**30


def a_proc(directory: Path, *, total_kib: int, available_kib: int, resident_pages: int) -> Path:
    """A /proc with these figures."""
    (directory / "self").mkdir(parents=True)
    (directory / "meminfo").write_text(
        f"MemTotal:       {total_kib} kB\nMemFree: 1 kB\nMemAvailable: {available_kib} kB\nHugePages_Total: 0\n"
    )
    (directory / "self" / "statm").write_text(f"999999 {resident_pages} 3 4 0 5 0\n")
    return directory


def a_group(directory: Path, *, limit: str, current: int, inactive_file: int) -> Path:
    """A control group with these figures."""
    directory.mkdir()
    (directory / "memory.max").write_text(f"{limit}\n")
    (directory / "memory.current").write_text(f"{current}\n")
    (directory / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")
    return directory


class TestRam:
    """Reading the RAM."""

    def test_figures_of_proc(self, tmp_path: Path) -> None:
        """Total, free and this process's part are what /proc says."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=400, resident_pages=7)
        assert read_ram(proc, tmp_path / "none") == Usage(
            total_bytes=1000 * 1024,
            used_bytes=600 * 1024,
            free_bytes=400 * 1024,
            ours_bytes=7 * os.sysconf("SC_PAGE_SIZE"),
        )

    def test_a_containers_limit(self, tmp_path: Path) -> None:
        """A container has what its control group allows, file pages that can be forgotten counting as free."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=900, resident_pages=7)
        group = a_group(tmp_path / "group", limit=str(500 * 1024), current=300 * 1024, inactive_file=100 * 1024)
        ram = read_ram(proc, group)
        assert (ram.total_bytes, ram.free_bytes) == (500 * 1024, 300 * 1024)

    def test_a_machine_smaller_than_the_limit(self, tmp_path: Path) -> None:
        """A control group that allows more than there is does not make it more."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=400, resident_pages=7)
        group = a_group(tmp_path / "group", limit=str(GIB), current=0, inactive_file=0)
        ram = read_ram(proc, group)
        assert (ram.total_bytes, ram.free_bytes) == (1000 * 1024, 400 * 1024)

    def test_no_limit(self, tmp_path: Path) -> None:
        """A control group without a limit says "max"."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=400, resident_pages=7)
        group = a_group(tmp_path / "group", limit="max", current=1, inactive_file=0)
        assert read_ram(proc, group).free_bytes == 400 * 1024

    def test_of_this_machine(self) -> None:
        """On the machine at hand the figures are sane, and a large array is seen to come and, trimmed, to go."""
        probe = open_probe("cpu")
        probe.reclaim(collect=True)  # what others left free on the heap would be filled first
        before = probe.device()
        assert before.kind == "cpu"
        assert 0 < before.ours_bytes < before.used_bytes < before.total_bytes
        # Small blocks, so that they come from the heap, which does not shrink by itself while anything lies above.
        blocks = [np.ones(1000) for _ in range(20_000)]
        above = np.ones(1000)
        during = probe.device().ours_bytes
        assert during - before.ours_bytes > 100_000_000
        del blocks
        probe.reclaim(collect=True)
        after = probe.device().ours_bytes
        assert during - after > 0.9 * (during - before.ours_bytes)
        assert above.sum() == 1000

    def test_collects_garbage_only_when_told(self) -> None:
        """A collection stops all threads, so it is run where asked for and nowhere else."""
        probe = open_probe("cpu")
        collections: list[str] = []

        def note(phase: str, _info: dict[str, int]) -> None:
            collections.append(phase)

        gc.disable()
        gc.callbacks.append(note)
        try:
            probe.reclaim(collect=False)
            assert collections == []
            probe.reclaim(collect=True)
            assert collections == ["start", "stop"]
        finally:
            gc.callbacks.remove(note)
            gc.enable()


class TestBudget:
    """What may be taken."""

    @pytest.mark.parametrize(
        ("total_gib", "free_gib", "reserve_bytes"),
        [(8, 8, MIN_RESERVE_BYTES), (80, 60, 80 * GIB // 20), (8, 0.5, GIB // 4), (8, 0, 0)],
    )
    def test_default(self, total_gib: float, free_gib: float, reserve_bytes: int) -> None:
        """All that is free but a share of the total, a minimum of it at least, and never more than half of it."""
        free = int(free_gib * GIB)
        usage = Usage(total_bytes=int(total_gib * GIB), used_bytes=0, free_bytes=free, ours_bytes=0)
        assert default_budget(usage, 0) == free - reserve_bytes

    def test_as_set(self) -> None:
        """A budget that is set is the budget, on the device and on the host."""
        probe = open_probe("cpu", budget_bytes=123, host_budget_bytes=456)
        assert probe.device().budget_bytes == 123
        assert probe.host().budget_bytes == 456

    def test_of_a_cpu(self, tmp_path: Path) -> None:
        """On a CPU the device's follows what is free, what this process grew by being its own; the host's stays."""
        proc = a_proc(tmp_path / "proc", total_kib=4 * 2**20, available_kib=2 * 2**20, resident_pages=1000)
        probe = CpuProbe(proc=proc, cgroup=tmp_path / "none")
        at_start = 2 * GIB - MIN_RESERVE_BYTES
        assert probe.device().budget_bytes == probe.host().budget_bytes == at_start
        (proc / "meminfo").write_text(f"MemTotal: 4194304 kB\nMemAvailable: {3 * 2**19} kB\n")
        assert probe.device().budget_bytes == at_start - GIB // 2
        (proc / "self" / "statm").write_text(f"999999 {1000 + GIB // 4 // os.sysconf('SC_PAGE_SIZE')} 3 4 0 5 0\n")
        assert probe.device().budget_bytes == at_start - GIB // 4
        assert probe.host().budget_bytes == at_start

    def test_of_a_gpu(self) -> None:
        """On a GPU what this process holds is its own, and what its neighbours take or give back is seen at once."""
        driver = FakeDriver(Usage(total_bytes=8 * GIB, used_bytes=3 * GIB, free_bytes=5 * GIB, ours_bytes=GIB))
        probe = CudaProbe(driver)
        device = probe.device()
        assert device.budget_bytes == 6 * GIB - MIN_RESERVE_BYTES
        assert (device.name, device.kind, device.others_bytes) == ("a fake GPU", "cuda", 2 * GIB)
        driver.usage = Usage(total_bytes=8 * GIB, used_bytes=7 * GIB, free_bytes=GIB, ours_bytes=4 * GIB)
        assert probe.device().budget_bytes == 5 * GIB - MIN_RESERVE_BYTES


class FakeDriver:
    """A CUDA driver with the reading that it is given."""

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


UUIDS = [b"GPU-11112222-aaaa", b"GPU-33334444-bbbb", b"GPU-33335555-cccc"]


class FakeNvml:
    """pynvml with three devices, whose handles are their numbers, and one process, which may be ours.

    `trouble` names a function that raises. A device of another id is an instance of one (MIG).
    """

    class NVMLError(Exception):
        """What pynvml raises."""

    def __init__(self, pid: int = 1, used_by_pid: int | None = 1, *, trouble: str = "", mig: bool = False) -> None:
        self._process = SimpleNamespace(pid=pid, usedGpuMemory=used_by_pid)
        self._trouble = trouble
        self._mig = mig
        self.used = 700
        self.asked: int | str | None = None

    def __getattribute__(self, name: str) -> Any:
        """Whatever is called so fails where it is the trouble."""
        value = object.__getattribute__(self, name)
        if name.startswith("nvml") and name == self._trouble:
            raise self.NVMLError(name)
        return value

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's name
        """Nothing to start."""

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
        return [self._process]


class TestCuda:
    """Reading a GPU, without one."""

    def test_nvml(self) -> None:
        """The device's figures and this process's part are NVML's."""
        driver = NvmlDriver(FakeNvml(os.getpid(), 250), None)
        assert driver.name() == "NVIDIA Fake"
        assert driver.read() == Usage(total_bytes=1000, used_bytes=700, free_bytes=300, ours_bytes=250)

    @pytest.mark.parametrize(
        "nvml",
        [FakeNvml(0, 250), FakeNvml(os.getpid(), None), FakeNvml(trouble="nvmlDeviceGetComputeRunningProcesses")],
    )
    def test_nvml_that_does_not_know_us(self, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where NVML cannot tell this process's part it is what torch and its context hold, and nothing without torch.

        So it is in containers (ids of their own), and on WSL 2 and virtual GPUs (no list at all).
        """
        probe = CudaProbe(NvmlDriver(nvml, None))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        probe.start()
        assert probe.device().ours_bytes == 0
        monkeypatch.setitem(sys.modules, "torch", FakeTorch(nvml))  # type: ignore[arg-type] -- stands in for the module
        for _ in range(2):
            probe.start()
            assert probe.device().ours_bytes == FakeTorch.CONTEXT + 60

    @pytest.mark.parametrize(
        ("visible", "handle"),
        [
            (None, 0),
            ("", 0),
            ("2,0", 2),
            ("GPU-33334444-bbbb, GPU-11112222-aaaa", 1),
            ("GPU-33335", 2),
            ("MIG-9", "MIG-9"),
        ],
    )
    def test_nvml_device(self, visible: str | None, handle: int | str) -> None:
        """The device is the first that CUDA_VISIBLE_DEVICES names, by number, by id or by the beginning of one."""
        nvml = FakeNvml()
        NvmlDriver(nvml, visible).read()
        assert nvml.asked == handle

    @pytest.mark.parametrize(
        ("nvml", "visible", "driver"),
        [
            (FakeNvml(), "0", NvmlDriver),
            (FakeNvml(trouble="nvmlDeviceGetComputeRunningProcesses"), "0", NvmlDriver),
            (FakeNvml(mig=True), "MIG-9", NvmlDriver),
            (FakeNvml(mig=True), "0", TorchDriver),
            (FakeNvml(mig=True), "GPU-1111", TorchDriver),
            (FakeNvml(trouble="nvmlInit"), "0", TorchDriver),
            (FakeNvml(trouble="nvmlDeviceGetMemoryInfo"), "0", TorchDriver),
            (FakeNvml(), "GPU-9", TorchDriver),
            (None, "0", TorchDriver),
        ],
    )
    def test_who_tells(
        self, nvml: FakeNvml | None, visible: str, driver: type, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NVML where it can; torch where that is missing, broken, or would tell of more than CUDA will use.

        Either way there is a GPU, and it can be read.
        """
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type] -- stands in for the module
        monkeypatch.setitem(sys.modules, "torch", FakeTorch())  # type: ignore[arg-type] -- stands in for the module
        monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
        assert cuda_present()
        name, total = ("NVIDIA Fake", 1000) if driver is NvmlDriver else ("Fake 4000", 100)
        device = open_probe("cuda").device()
        assert (device.name, device.total_bytes) == (name, total)

    def test_no_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is none where neither NVML nor torch sees one, or where all are hidden."""
        torch = FakeTorch()
        torch.available = False
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(trouble="nvmlInit"))  # type: ignore[arg-type] -- as above
        monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type] -- as above
        monkeypatch.setattr(ctypes, "CDLL", lambda _name: SimpleNamespace())
        assert not cuda_present()
        torch.available = True
        assert cuda_present()
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        assert not cuda_present()

    def test_torch(self) -> None:
        """Without NVML the figures are torch's."""
        driver = TorchDriver(FakeTorch())
        assert driver.name() == "Fake 4000"
        assert driver.read() == Usage(total_bytes=100, used_bytes=70, free_bytes=30, ours_bytes=60)

    def test_reclaim(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Freed blocks go back to the driver once all work on them is over."""
        torch = FakeTorch()
        monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type] -- stands in for the module
        CudaProbe(FakeDriver(Usage(total_bytes=1, used_bytes=0, free_bytes=1, ours_bytes=0))).reclaim(collect=False)
        assert torch.calls == ["synchronize", "empty_cache"]

    def test_looking_does_not_import_torch(self) -> None:
        """The probe of a CPU, and of a GPU that NVML knows, are read without importing torch."""
        script = (
            "import sys\n"
            "from gpu_worker.residency.memory import CudaProbe, NvmlDriver, cuda_present, open_probe\n"
            "from tests.gpu_worker.test_memory import FakeNvml\n"
            "cuda_present()\n"
            "for probe in (open_probe('cpu'), CudaProbe(NvmlDriver(FakeNvml(), None))):\n"
            "    probe.start(), probe.device(), probe.host(), probe.reclaim(collect=True)\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


class FakeTorch:
    """What the probe uses of torch, with one reading.

    Starting it makes a context on the device of `nvml`.
    """

    CONTEXT = 44

    class OutOfMemoryError(RuntimeError):
        """What torch raises."""

    def __init__(self, nvml: FakeNvml | None = None) -> None:
        self.cuda = self
        self.calls: list[str] = []
        self.available = True
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
        """What the allocator holds."""
        return 60

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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
        RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    """Python's, torch's CPU allocator's, CUDA's and its libraries' ways to say that memory ran out are known."""
    assert is_out_of_memory(error)


def test_torch_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises itself is known whatever it says."""
    monkeypatch.setitem(sys.modules, "torch", FakeTorch())  # type: ignore[arg-type] -- stands in for the module
    assert is_out_of_memory(FakeTorch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm( handle, opa, opb)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx( handle, opa, opb)`"),
        ValueError("CUDA error: out of memory"),
    ],
)
def test_not_out_of_memory(error: Exception) -> None:
    """Other errors are none, nor are the same words of somebody else."""
    assert not is_out_of_memory(error)
