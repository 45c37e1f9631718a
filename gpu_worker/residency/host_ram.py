"""Host RAM: what the kernel says of it, and freed memory given back to the system.

A container's limit counts: the figures are the smaller of the machine's and the control group's.
"""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

PROC: Final = Path("/proc")
CGROUP: Final = Path("/sys/fs/cgroup")
_KIB: Final = 1024


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of one memory, in bytes; `ours_bytes` is this process's part."""

    total_bytes: int
    used_bytes: int
    free_bytes: int
    ours_bytes: int


def read_ram(proc: Path = PROC, cgroup: Path = CGROUP) -> Usage:
    """The RAM as /proc and the process's control group (a container's limit) tell it."""
    fields = dict(_fields(proc / "meminfo"))
    total, free = fields["MemTotal"] * _KIB, fields["MemAvailable"] * _KIB
    # statm counts pages; the second figure is what this process has resident.
    resident_pages = int((proc / "self" / "statm").read_text().split()[1])
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit = int((cgroup / "memory.max").read_text())
        # Files the kernel can forget are counted as used by the group, but are as good as free.
        forgettable = dict(_fields(cgroup / "memory.stat"))["inactive_file"]
        in_use = int((cgroup / "memory.current").read_text()) - forgettable
        total, free = min(total, limit), max(0, min(free, limit - in_use))
    return Usage(
        total_bytes=total,
        used_bytes=total - free,
        free_bytes=free,
        ours_bytes=resident_pages * os.sysconf("SC_PAGE_SIZE"),
    )


def trim_host(*, collect: bool) -> None:
    """Let the C library return what is free to the system, where it can (glibc); before that `collect` garbage."""
    if collect:
        gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _fields(path: Path) -> Iterator[tuple[str, int]]:
    for line in path.read_text().splitlines():
        name, figure, *_ = line.replace(":", " ").split()
        yield name, int(figure)
