"""The number of threads that compute on the CPU, and the way they wait for each other.

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

    A thread that waits for the others soon sleeps instead of spinning. On two busy cores (load average 4 to 10) an int8
    product of 6144 x 1024 weights took 0.4 to 1.7 ms so, and 9 to 24 ms with threads that spin (medians).
    Threads that sleep at once took 0.4 to 1.6 ms; on two free cores 0.33 ms instead of 0.20.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")
        environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for OpenMP libraries other than GCC's
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
