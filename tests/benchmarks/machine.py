"""Describes the machine of a benchmark: processor, memory, GPU with its clocks, versions, commit, date.

It changes no clocks, and does not import torch, so that a small client process may use it.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]


def describe() -> list[str]:
    """One line each: date and commit, the processor, every GPU that NVML finds, the versions."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [f"{now}, commit {commit()}", processor(), *gpus(), versions()]


def commit() -> str:
    """The checked-out commit, and whether files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with uncommitted changes" if changed else head


def processor() -> str:
    """Model, the cores that this process may use, RAM, and the load average."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    busy = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return f"{model}, {cores} cores, {memory:.0f} GiB RAM; load average before: {busy}"


def gpus() -> list[str]:
    """Name, memory, driver, clocks (now / maximum, MHz) and power limit of every GPU; one line if there is none."""
    try:
        import pynvml  # noqa: PLC0415 -- of the gpu extra

        pynvml.nvmlInit()
    except (ImportError, OSError) as error:
        return [f"no GPU: {error}"]
    except pynvml.NVMLError as error:
        return [f"no GPU: {error}"]
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        count = pynvml.nvmlDeviceGetCount()
        return [f"{_gpu(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))}, driver {driver}" for index in range(count)]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, device: Any) -> str:
    parts = [nvml.nvmlDeviceGetName(device), f"{nvml.nvmlDeviceGetMemoryInfo(device).total / 2**30:.0f} GiB"]
    # A virtual or partitioned GPU may not support these.
    with contextlib.suppress(nvml.NVMLError):
        for name, clock in (("SM", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            now, most = nvml.nvmlDeviceGetClockInfo(device, clock), nvml.nvmlDeviceGetMaxClockInfo(device, clock)
            parts.append(f"{name} clock {now} of {most} MHz")
        parts.append(f"{nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000:.0f} W")
    return ", ".join(parts)


def versions() -> str:
    """Python, torch and the official package."""
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "qwen-tts", "granian"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def _git(*arguments: str) -> str:
    answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607 -- the user's own git
    return answer.stdout.strip()
