"""The readings are the kernel's and the driver's, and what is freed goes back to them."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_worker.memory import (
    MIN_RESERVE_BYTES,
    CpuProbe,
    CudaProbe,
    NvmlDriver,
    TorchDriver,
    Usage,
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
        assert default_budget(usage) == free - reserve_bytes

    def test_as_set(self) -> None:
        """A budget that is set is the budget, on the device and on the host."""
        probe = open_probe("cpu", budget_bytes=123, host_budget_bytes=456)
        assert probe.device().budget_bytes == 123
        assert probe.host().budget_bytes == 456

    def test_of_a_cpu(self, tmp_path: Path) -> None:
        """On a CPU both budgets are made of the RAM that was free at the start, and stay."""
        proc = a_proc(tmp_path / "proc", total_kib=4 * 2**20, available_kib=2 * 2**20, resident_pages=1)
        probe = CpuProbe(proc=proc, cgroup=tmp_path / "none")
        assert probe.device().budget_bytes == probe.host().budget_bytes == 2 * GIB - MIN_RESERVE_BYTES
        (proc / "meminfo").write_text("MemTotal: 4194304 kB\nMemAvailable: 1 kB\n")
        assert probe.device().free_bytes == 1024
        assert probe.device().budget_bytes == 2 * GIB - MIN_RESERVE_BYTES

    def test_of_a_gpu(self) -> None:
        """On a GPU what this process held before counts as its own."""
        probe = CudaProbe(
            FakeDriver(Usage(total_bytes=8 * GIB, used_bytes=3 * GIB, free_bytes=5 * GIB, ours_bytes=GIB))
        )
        device = probe.device()
        assert device.budget_bytes == 6 * GIB - MIN_RESERVE_BYTES
        assert (device.name, device.kind, device.others_bytes) == ("a fake GPU", "cuda", 2 * GIB)


class FakeDriver:
    """A CUDA driver with one reading."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage

    def name(self) -> str:
        """Its name."""
        return "a fake GPU"

    def read(self) -> Usage:
        """The reading."""
        return self._usage


class FakeNvml:
    """pynvml with one device and one process, which may be ours."""

    class NVMLError(Exception):
        """What pynvml raises."""

    def __init__(self, pid: int, used_by_pid: int | None) -> None:
        self._process = SimpleNamespace(pid=pid, usedGpuMemory=used_by_pid)
        self.handles: list[int | str] = []

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's name
        """Nothing to start."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802 -- NVML's name
        """Note which."""
        self.handles.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802 -- NVML's name
        """Note which."""
        self.handles.append(uuid)
        return "handle"

    def nvmlDeviceGetName(self, _handle: str) -> bytes:  # noqa: N802 -- NVML's name
        """Older versions give bytes."""
        return b"NVIDIA Fake"

    def nvmlDeviceGetMemoryInfo(self, _handle: str) -> Any:  # noqa: N802 -- NVML's name
        """One reading."""
        return SimpleNamespace(total=1000, used=700, free=300)

    def nvmlDeviceGetComputeRunningProcesses(self, _handle: str) -> list[Any]:  # noqa: N802 -- NVML's name
        """One process."""
        return [self._process]


class TestCuda:
    """Reading a GPU, without one."""

    def test_nvml(self) -> None:
        """The device's figures and this process's part are NVML's."""
        driver = NvmlDriver(FakeNvml(os.getpid(), 250), None)
        assert driver.name() == "NVIDIA Fake"
        assert driver.read() == Usage(total_bytes=1000, used_bytes=700, free_bytes=300, ours_bytes=250)

    @pytest.mark.parametrize(("pid", "used"), [(0, 250), (os.getpid(), None)])
    def test_nvml_that_does_not_know_us(self, pid: int, used: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where NVML cannot tell this process's part it is what torch has reserved, and nothing without torch."""
        driver = NvmlDriver(FakeNvml(pid, used), None)
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        assert driver.read().ours_bytes == 0
        monkeypatch.setitem(sys.modules, "torch", FakeTorch())  # type: ignore[arg-type] -- stands in for the module
        assert driver.read().ours_bytes == 60

    @pytest.mark.parametrize(
        ("visible", "handle"), [(None, 0), ("", 0), ("2,0", 2), ("GPU-1234, GPU-5", "GPU-1234"), ("MIG-9", "MIG-9")]
    )
    def test_nvml_device(self, visible: str | None, handle: int | str) -> None:
        """The device is the first that CUDA_VISIBLE_DEVICES names, by number or by id."""
        nvml = FakeNvml(1, 1)
        NvmlDriver(nvml, visible)
        assert nvml.handles == [handle]

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
            "from gpu_worker.memory import CudaProbe, NvmlDriver, cuda_present, open_probe\n"
            "from tests.gpu_worker.test_memory import FakeNvml\n"
            "cuda_present()\n"
            "for probe in (open_probe('cpu'), CudaProbe(NvmlDriver(FakeNvml(1, 1), None))):\n"
            "    probe.device(), probe.host(), probe.reclaim(collect=True)\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


class FakeTorch:
    """What the probe uses of torch, with one reading."""

    class OutOfMemoryError(RuntimeError):
        """torch's own."""

    def __init__(self) -> None:
        self.cuda = self
        self.calls: list[str] = []

    def is_initialized(self) -> bool:
        """CUDA has been started."""
        return True

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
