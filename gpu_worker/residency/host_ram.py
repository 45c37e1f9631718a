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
    ("", "", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of control groups of version 2, then of version 1: their name in /proc/self/cgroup, their folder, the files of limit
and usage, and the field of evictable files in memory.stat."""

_KIB: Final = 1024


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one memory, in bytes; `ours_bytes` is this process's part."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int


def read_ram(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Usage:
    """RAM as /proc and the process's control groups (the limit of a container or a unit) report it."""
    fields = dict(_fields(proc / "meminfo"))
    total, free = fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB
    # statm counts pages; the second figure is what this process has resident.
    resident_pages = int((proc / "self" / "statm").read_text().split()[1])
    for controller, folder, limit_file, usage_file, evictable_field in _GROUP_FILES:
        for group in _groups(proc, cgroup / folder, controller):
            with contextlib.suppress(OSError, ValueError, KeyError):
                limit = int((group / limit_file).read_text())
                # The group counts cached files as used; the kernel evicts them when memory is needed.
                evictable = dict(_fields(group / "memory.stat"))[evictable_field]
                in_use = int((group / usage_file).read_text()) - evictable
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


def _groups(proc: Path, root: Path, controller: str) -> list[Path]:
    """The control groups that limit this process: `root`, which is a container's own, and those below it.

    systemd's MemoryMax is a limit of a group below the root.
    """
    groups = [root]
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == controller:
                own = root / path.lstrip("/")
                groups += [group for group in (own, *own.parents) if root in group.parents]
    return groups


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, figure, *_ = line.replace(":", " ").split()
        yield name, int(figure)
