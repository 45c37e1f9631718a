"""The probe: budgets, and what reading and reclaiming may not do."""

import functools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpu_worker.residency.host_ram import CpuDriver, Usage, read_ram
from gpu_worker.residency.memory import MIN_RESERVE_BYTES, MemoryProbe, default_budget, open_probe
from tests.gpu_worker.residency.fake_drivers import FakeDriver, FakeTorch
from tests.gpu_worker.residency.test_host_ram import a_proc

GIB = 2**30


class TestBudget:
    """Budgets."""

    @pytest.mark.parametrize(
        ("total_gib", "free_gib", "reserve_bytes"),
        [(8, 8, MIN_RESERVE_BYTES), (80, 60, 80 * GIB // 20), (8, 0.5, GIB // 4), (8, 0, 0)],
    )
    def test_default(self, total_gib: float, free_gib: float, reserve_bytes: int) -> None:
        """The default budget is what is free less a reserve: a share of the total, at least a minimum, at most half."""
        free = int(free_gib * GIB)
        usage = Usage(total_bytes=int(total_gib * GIB), used_bytes=0, free_bytes=free, ours_bytes=0)
        assert default_budget(usage, 0) == free - reserve_bytes

    def test_configured(self) -> None:
        """A configured budget counts as it is, on the device and on the host."""
        probe = open_probe("cpu", budget_bytes=123, host_budget_bytes=456)
        assert probe.device().budget_bytes == 123
        assert probe.host().budget_bytes == 456
        probe.set_budgets(None, None)
        assert min(probe.device().budget_bytes, probe.host().budget_bytes) > 1_000_000  # what the machine has
        probe.set_budgets(7, 8)
        assert (probe.device().budget_bytes, probe.host().budget_bytes) == (7, 8)

    def test_of_a_cpu(self, tmp_path: Path) -> None:
        """In CPU mode the device's budget follows free RAM plus this process's growth; the host's is fixed at start."""
        proc = a_proc(tmp_path / "proc", total_kib=4 * 2**20, available_kib=2 * 2**20, resident_pages=1000)
        ram = functools.partial(read_ram, proc, tmp_path / "none")
        probe = MemoryProbe(CpuDriver(ram), ram=ram)
        at_start = 2 * GIB - MIN_RESERVE_BYTES
        assert probe.device().budget_bytes == probe.host().budget_bytes == at_start
        (proc / "meminfo").write_text(f"MemTotal: 4194304 kB\nMemAvailable: {3 * 2**19} kB\n")
        assert probe.device().budget_bytes == at_start - GIB // 2
        (proc / "self" / "statm").write_text(f"999999 {1000 + GIB // 4 // os.sysconf('SC_PAGE_SIZE')} 3 4 0 5 0\n")
        assert probe.device().budget_bytes == at_start - GIB // 4
        assert probe.host().budget_bytes == at_start

    def test_of_a_gpu(self) -> None:
        """On a GPU the budget is what this process holds plus what is free, at every reading."""
        driver = FakeDriver(Usage(total_bytes=8 * GIB, used_bytes=3 * GIB, free_bytes=5 * GIB, ours_bytes=GIB))
        probe = MemoryProbe(driver)
        device = probe.device()
        assert device.budget_bytes == 6 * GIB - MIN_RESERVE_BYTES
        assert (device.name, device.kind, device.others_bytes) == ("a fake GPU", "cuda", 2 * GIB)
        driver.usage = Usage(total_bytes=8 * GIB, used_bytes=7 * GIB, free_bytes=GIB, ours_bytes=4 * GIB)
        assert probe.device().budget_bytes == 5 * GIB - MIN_RESERVE_BYTES


class TestCuda:
    """The probe of a GPU."""

    def test_reclaim(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`reclaim` synchronizes, then empties the allocator's cache."""
        torch = FakeTorch()
        monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type] -- stands in for the module
        MemoryProbe(FakeDriver(Usage(total_bytes=1, used_bytes=0, free_bytes=1, ours_bytes=0))).reclaim(collect=False)
        assert torch.calls == ["synchronize", "empty_cache"]

    def test_nothing_is_reclaimed_beside_a_move(self) -> None:
        """Only the thread that moves a model may reclaim memory meanwhile."""
        probe = MemoryProbe(FakeDriver(Usage(total_bytes=1, used_bytes=0, free_bytes=1, ours_bytes=0)))
        refused: list[BaseException] = []

        def reclaim() -> None:
            try:
                probe.reclaim(collect=False)
            except RuntimeError as error:
                refused.append(error)

        def in_another_thread() -> int:
            thread = threading.Thread(target=reclaim)
            thread.start()
            thread.join()
            return len(refused)

        with probe.moving():
            probe.reclaim(collect=False)
            assert in_another_thread() == 1
        assert in_another_thread() == 1

    def test_reading_does_not_import_torch(self) -> None:
        """Reading a CPU, or a GPU through NVML, imports no torch."""
        script = (
            "import sys\n"
            "from gpu_worker.residency.memory import MemoryProbe, open_probe\n"
            "from gpu_worker.residency.nvidia import NvmlDriver, cuda_present\n"
            "from tests.gpu_worker.residency.fake_drivers import FakeNvml\n"
            "cuda_present()\n"
            "for probe in (open_probe('cpu'), MemoryProbe(NvmlDriver(FakeNvml(), None))):\n"
            "    probe.start(), probe.device(), probe.host(), probe.reclaim(collect=True)\n"
            "sys.exit('torch' in sys.modules)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
