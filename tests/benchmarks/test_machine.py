"""The machine's description."""

import sys
from typing import Any

import pytest

from tests.benchmarks import machine


class FakeNvmlError(Exception):
    """NVML's only error."""


class FakeNvml:
    """One GPU; `without_clocks`: its driver does not report clocks."""

    NVMLError = FakeNvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *, without_clocks: bool) -> None:
        self._without_clocks = without_clocks
        self.open = False

    def nvmlInit(self) -> None:  # noqa: N802 -- NVML's names, here and below
        """Begin."""
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        """End."""
        self.open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """One."""
        return 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        """A version."""
        return "580.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        """A handle."""
        return index

    def nvmlDeviceGetName(self, _device: int) -> str:  # noqa: N802
        """A name."""
        return "Fast One"

    def nvmlDeviceGetMemoryInfo(self, _device: int) -> Any:  # noqa: N802
        """80 GiB."""
        return type("Memory", (), {"total": 80 << 30})

    def nvmlDeviceGetClockInfo(self, _device: int, clock: int) -> int:  # noqa: N802
        """A tenth below the most."""
        if self._without_clocks:
            raise FakeNvmlError
        return 900 * clock

    def nvmlDeviceGetMaxClockInfo(self, _device: int, clock: int) -> int:  # noqa: N802
        """The maximum."""
        return 1000 * clock

    def nvmlDeviceGetEnforcedPowerLimit(self, _device: int) -> int:  # noqa: N802
        """In milliwatts."""
        return 700_000


@pytest.mark.parametrize("without_clocks", [False, True])
def test_gpu_is_described_with_its_clocks_if_known(monkeypatch: pytest.MonkeyPatch, *, without_clocks: bool) -> None:
    """Name, memory and driver always; clocks and power limit if the driver reports them. NVML is closed."""
    nvml = FakeNvml(without_clocks=without_clocks)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    clocks = "" if without_clocks else ", SM clock 900 of 1000 MHz, memory clock 1800 of 2000 MHz, 700 W"
    assert machine.gpus() == [f"Fast One, 80 GiB{clocks}, driver 580.1"]
    assert not nvml.open


def test_description_names_time_commit_and_versions() -> None:
    """The description has time, commit, processor, GPUs and versions."""
    when, processor, *gpus, versions = machine.describe()
    assert "UTC, commit " in when
    assert "cores" in processor
    assert gpus
    assert versions.startswith("Python 3.")
