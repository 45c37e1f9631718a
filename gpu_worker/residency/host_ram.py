"""Host RAM: the kernel's figures, and freed memory returned to the system.

A container's limit counts: the figures are the smaller of the machine's and the control group's.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import msgspec

from shared.heap import trim_heap

_PROC: Final = Path("/proc")
_CGROUP: Final = Path("/sys/fs/cgroup")
_GROUP_FILES: Final = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of a control group of version 2, then of version 1: limit, usage, statistics, and the field of evictable files."""
_KIB: Final = 1024


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one memory, in bytes; `ours_bytes` is this process's part."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int


def read_ram(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Usage:
    """RAM as /proc and the process's control group (a container's limit) report it."""
    fields = dict(_fields(proc / "meminfo"))
    total, free = fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB
    # statm counts pages; the second figure is what this process has resident.
    resident_pages = int((proc / "self" / "statm").read_text().split()[1])
    for limit_file, usage_file, stat_file, evictable_field in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):
            limit = int((cgroup / limit_file).read_text())
            # The group counts cached files as used; the kernel evicts them when memory is needed.
            evictable = dict(_fields(cgroup / stat_file))[evictable_field]
            in_use = int((cgroup / usage_file).read_text()) - evictable
            total, free = min(total, limit), max(0, min(free, limit - in_use))
    return Usage(
        total_bytes=total,
        used_bytes=total - free,
        free_bytes=free,
        ours_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
    )


class CpuDriver:
    """CPU mode: the device's memory is host RAM."""

    kind: Literal["cuda", "cpu"] = "cpu"

    def __init__(self, ram: Callable[[], Usage] = read_ram) -> None:
        self.read = ram

    def name(self) -> str:
        """The name of every CPU."""
        return "CPU"

    def start(self) -> None:
        """Nothing has to be started."""


def trim_host(*, collect: bool) -> None:
    """Let the C library return free memory to the system; with `collect`, collect garbage first."""
    if collect:
        gc.collect()
    trim_heap()


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, figure, *_ = line.replace(":", " ").split()
        yield name, int(figure)
