"""NVIDIA drivers: which one answers, for which device, and with which figures."""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpu_worker.residency.host_ram import Usage
from gpu_worker.residency.memory import MemoryProbe, open_probe
from gpu_worker.residency.nvidia import NvmlDriver, TorchDriver, cuda_capability, cuda_present, cuda_problem
from tests.gpu_worker.fakes import FakeClock
from tests.gpu_worker.residency.fake_drivers import FakeNvml, FakeTorch


class TestDrivers:
    """NVML if it knows the device, else torch."""

    def test_nvml(self) -> None:
        """The device's figures and this process's part are NVML's."""
        driver = NvmlDriver(FakeNvml(os.getpid(), 250), None)
        assert driver.name() == "NVIDIA Fake"
        assert driver.read() == Usage(total_bytes=1000, used_bytes=700, free_bytes=300, ours_bytes=250)

    @pytest.mark.parametrize(
        "nvml",
        [FakeNvml(0, 250), FakeNvml(os.getpid(), None), FakeNvml(trouble="nvmlDeviceGetComputeRunningProcesses")],
    )
    def test_nvml_without_this_process(self, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where NVML cannot tell this process's part it is what torch and its context hold, and nothing without torch.

        So it is in containers (ids of their own), and on WSL 2 and virtual GPUs (no list at all).
        """
        probe = MemoryProbe(NvmlDriver(nvml, None))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        probe.start()
        assert probe.device().ours_bytes == 0
        monkeypatch.setitem(sys.modules, "torch", FakeTorch(nvml))  # type: ignore[arg-type] -- stands in for the module
        for _ in range(2):
            probe.start()
            assert probe.device().ours_bytes == FakeTorch.CONTEXT + 60

    def test_list_of_processes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is read again once a second, and at once when torch has reserved more or less."""
        nvml, clock, torch = FakeNvml(os.getpid(), 250), FakeClock(), FakeTorch()
        driver = NvmlDriver(nvml, None, clock)
        monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type] -- stands in for the module
        assert driver.read().ours_bytes == 250
        nvml.process.usedGpuMemory, nvml.used = 300, 800
        assert (driver.read().ours_bytes, driver.read().used_bytes) == (250, 800)
        clock.advance(1.5)
        assert driver.read().ours_bytes == 300
        nvml.process.usedGpuMemory = 400
        torch.reserved = 61
        assert driver.read().ours_bytes == 400

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
        """The device is the first of CUDA_VISIBLE_DEVICES, by index, by UUID or by the beginning of a UUID."""
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
    def test_which_driver(
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
        """There is no GPU if neither NVML nor torch sees one, or if all are hidden."""
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

    def test_capability(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is known without CUDA, or not at all."""
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        for nvml, known in (
            (FakeNvml(), (8, 6)),
            (FakeNvml(trouble="nvmlInit"), None),
            (FakeNvml(trouble="nvmlDeviceGetCudaComputeCapability"), None),
        ):
            monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type] -- stands in for the module
            assert cuda_capability() == known

    def test_torch(self) -> None:
        """Without NVML the figures are torch's."""
        driver = TorchDriver(FakeTorch())
        assert driver.name() == "Fake 4000"
        assert driver.read() == Usage(total_bytes=100, used_bytes=70, free_bytes=30, ours_bytes=60)


class TestCudaProblem:
    """Reasons why an installed torch cannot use a GPU that NVML shows."""

    def problem(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, cuda: str | None, nvml: FakeNvml | None
    ) -> str | None:
        """With a torch that is built for `cuda`."""
        (folder / "version.py").write_text(f"__version__ = '2.13.0'\ncuda = {cuda!r}\n")
        spec = SimpleNamespace(origin=str(folder / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: spec)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type] -- stands in for the module
        return cuda_problem()

    def test_old_driver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """One sentence has both versions, and the driver that is needed."""
        assert self.problem(monkeypatch, tmp_path, "13.0", FakeNvml()) == (
            "the NVIDIA driver 550.54.15 supports CUDA 12.4, and torch 2.13.0 needs CUDA 13.0: "
            "install driver 580 or newer"
        )
        assert "install a newer driver" in str(self.problem(monkeypatch, tmp_path, "14.1", FakeNvml()))

    @pytest.mark.parametrize("cuda", ["12.1", "12.8", "11.8"])
    def test_driver_of_the_same_major_version(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str) -> None:
        """CUDA promises that it runs every torch of that version and of older ones."""
        assert self.problem(monkeypatch, tmp_path, cuda, FakeNvml()) is None

    def test_torch_without_cuda(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A build for CPUs uses no GPU."""
        assert "built without CUDA" in str(self.problem(monkeypatch, tmp_path, None, FakeNvml()))

    def test_what_is_unknown_is_no_problem(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Neither a machine without NVML, nor one without torch: others say so."""
        assert self.problem(monkeypatch, tmp_path, "13.0", None) is None
        assert self.problem(monkeypatch, tmp_path, "13.0", FakeNvml(trouble="nvmlInit")) is None
        monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
        assert cuda_problem() is None

    def test_the_real_torch(self) -> None:
        """Its version.py has what is read, and torch is not imported for it."""
        program = (
            "import sys; from gpu_worker.residency import cuda_problem; cuda_problem(); print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == "False"
