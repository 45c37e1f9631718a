"""Host RAM: the figures are the kernel's, and freed memory goes back to the system."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from gpu_worker.residency.host_ram import Usage, read_ram
from gpu_worker.residency.memory import open_probe

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
    """Readings of host RAM."""

    def test_figures_of_proc(self, tmp_path: Path) -> None:
        """Total, free and this process's part are what /proc says."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=400, resident_pages=7)
        assert read_ram(proc, tmp_path / "none") == Usage(
            total_bytes=1000 * 1024,
            used_bytes=600 * 1024,
            free_bytes=400 * 1024,
            ours_bytes=7 * os.sysconf("SC_PAGE_SIZE"),
        )

    def test_container_limit(self, tmp_path: Path) -> None:
        """A container's limit counts; file pages that the kernel can evict count as free."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=900, resident_pages=7)
        group = a_group(tmp_path / "group", limit=str(500 * 1024), current=300 * 1024, inactive_file=100 * 1024)
        ram = read_ram(proc, group)
        assert (ram.total_bytes, ram.free_bytes) == (500 * 1024, 300 * 1024)

    def test_container_limit_of_version_1(self, tmp_path: Path) -> None:
        """Older hosts have control groups of version 1, with other files."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=900, resident_pages=7)
        group = tmp_path / "group" / "memory"
        group.mkdir(parents=True)
        (group / "memory.limit_in_bytes").write_text(f"{500 * 1024}\n")
        (group / "memory.usage_in_bytes").write_text(f"{300 * 1024}\n")
        (group / "memory.stat").write_text(f"cache 5\ninactive_file 1\ntotal_inactive_file {100 * 1024}\n")
        ram = read_ram(proc, group.parent)
        assert (ram.total_bytes, ram.free_bytes) == (500 * 1024, 300 * 1024)

    @pytest.mark.parametrize("limited", ["tts.slice", "tts.slice/tts.service"])
    def test_limit_of_a_unit(self, tmp_path: Path, limited: str) -> None:
        """MemoryMax of a unit, or of its slice, is the limit of a group below the root."""
        proc = a_proc(tmp_path / "proc", total_kib=1000, available_kib=900, resident_pages=7)
        (proc / "self" / "cgroup").write_text("0::/tts.slice/tts.service\n")
        root = tmp_path / "group"
        (root / limited).parent.mkdir(parents=True)
        a_group(root / limited, limit=str(500 * 1024), current=300 * 1024, inactive_file=100 * 1024)
        ram = read_ram(proc, root)
        assert (ram.total_bytes, ram.free_bytes) == (500 * 1024, 300 * 1024)

    def test_limit_above_the_machine(self, tmp_path: Path) -> None:
        """A control group's limit above the machine's RAM has no effect."""
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
        """On this machine a large array shows in the figures, and is gone after a trim."""
        probe = open_probe("cpu")
        probe.reclaim(collect=True)  # what others left free on the heap would be filled first
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
        """Garbage is collected only with `collect`: a collection stops all threads."""
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
