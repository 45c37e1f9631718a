"""How many threads compute on the CPU, and how they wait for each other.

Both must be in the environment before torch is imported: OpenMP reads it once. This module imports no torch.
"""

import contextlib
import os
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

_CPUS: Final = Path("/sys/devices/system/cpu")
_CGROUP: Final = Path("/sys/fs/cgroup")

CORES_TO_SHARE: Final = 4
"""From so many cores up, one is left to the web workers. Below, they take a few per cent of one: what they encode was
made by the same cores."""


def set_compute_threads(environ: MutableMapping[str, str], threads: int | None) -> None:
    """Set the environment variables of OpenMP. One that is set already stays, but `threads` goes before it.

    A thread that waits for the others sleeps instead of spinning. On two busy cores (load average 5 to 8) a float32
    product of 4 rows took 1 to 4 ms so, and 19 to 24 ms with threads that spin (4096 x 1024 weights, medians).
    """
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        environ["OMP_NUM_THREADS"] = str(threads)
    else:
        environ.setdefault("OMP_NUM_THREADS", str(default_threads(usable_cores())))


def default_threads(cores: int) -> int:
    """The number of threads for so many cores if none is configured."""
    return cores - 1 if cores >= CORES_TO_SHARE else cores


def usable_cores(cpus: Path = _CPUS, cgroup: Path = _CGROUP, affinity: set[int] | None = None) -> int:
    """Physical cores that this process may use, within the limit of its container; at least 1.

    Two threads of one core share its arithmetic units, so they count once.
    """
    usable = os.sched_getaffinity(0) if affinity is None else affinity
    cores = {_siblings(cpus / f"cpu{number}" / "topology", number) for number in usable}
    return max(1, min(len(cores), *(int(limit) for limit in _limits(cgroup)), len(usable)))


def _siblings(topology: Path, number: int) -> str:
    """The CPUs of the same core, as the kernel lists them."""
    with contextlib.suppress(OSError):
        return (topology / "thread_siblings_list").read_text().strip()
    return str(number)


def _limits(cgroup: Path) -> list[float]:
    """CPUs that the control group allows (version 2, then version 1); empty without a limit."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # "max 100000": no limit
        quota, period = (int(figure) for figure in (cgroup / "cpu.max").read_text().split())
        found.append(quota / period)
    with contextlib.suppress(OSError, ValueError):
        quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:
            found.append(quota / period)
    return found
