"""The number of compute threads: what the machine and its container leave."""

from pathlib import Path

import pytest

from gpu_worker.cpu_threads import default_threads, set_compute_threads, usable_cores


def cpus(directory: Path, *siblings: str) -> Path:
    """A /sys/devices/system/cpu whose CPUs have these siblings."""
    for number, listed in enumerate(siblings):
        topology = directory / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{listed}\n")
    return directory


def test_two_threads_of_a_core_count_once(tmp_path: Path) -> None:
    """A laptop with four cores and eight CPUs has four; a process bound to one core has one."""
    machine = cpus(tmp_path, *["0,4", "1,5", "2,6", "3,7"] * 2)
    assert usable_cores(machine, tmp_path / "none", set(range(8))) == 4
    assert usable_cores(machine, tmp_path / "none", {2, 6}) == 1


def test_a_machine_without_topology_has_its_cpus(tmp_path: Path) -> None:
    """Some containers hide it."""
    assert usable_cores(tmp_path, tmp_path, {0, 1, 2}) == 3


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit: str, cores: int) -> None:
    """More threads than that would be stopped in the middle of a product, and the others would wait for them."""
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores(tmp_path, tmp_path, set(range(8))) == cores


def test_the_limit_of_an_older_control_group_counts(tmp_path: Path) -> None:
    """A quota of -1 is none."""
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, cores in (("-1", 8), ("300000", 3)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert usable_cores(tmp_path, tmp_path, set(range(8))) == cores


def test_a_core_is_left_to_the_web_workers_where_there_are_four() -> None:
    """With two cores, both compute."""
    assert [default_threads(cores) for cores in (1, 2, 3, 4, 16)] == [1, 2, 3, 3, 15]


def test_the_setting_goes_before_the_environment() -> None:
    """Without it, what the environment says of OpenMP stays. Waiting threads sleep, unless it says otherwise."""
    environ = {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    set_compute_threads(environ, None)
    assert environ == {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "ACTIVE"}
    set_compute_threads(environ, 3)
    assert environ["OMP_NUM_THREADS"] == "3"
    fresh: dict[str, str] = {}
    set_compute_threads(fresh, None)
    assert (fresh["OMP_WAIT_POLICY"], fresh["GOMP_SPINCOUNT"]) == ("PASSIVE", "1000")
    assert int(fresh["OMP_NUM_THREADS"]) >= 1
