"""The figures of the process."""

import os
from typing import Any

from gpu_worker.reporter import DEVICE_READING_S, Reporter
from shared.protocol import Counters, HostMemory, Snapshot
from tests.gpu_worker.fakes import FakeClock, FakeDevice

HOST = HostMemory(total_bytes=9, free_bytes=8, ours_bytes=1, offloaded_bytes=0, budget_bytes=5)


def _reporter(device: FakeDevice, clock: FakeClock) -> Reporter:
    return Reporter(boot_id="b", default_model="m", probe=device, shared_bytes=lambda: {"codec": 3}, clock=clock)


def _snapshot(reporter: Reporter, **changes: Any) -> Snapshot:
    given: dict[str, Any] = {
        "accepting": True,
        "running": 1,
        "queued": 2,
        "slots": 3,
        "models": [],
        "host": HOST,
        "cleanup": None,
        "voices": [],
    }
    return reporter.snapshot(**{**given, **changes})


def test_counters() -> None:
    """Each outcome is counted for itself."""
    reporter = _reporter(FakeDevice(), FakeClock())
    for outcome in ("started", "started", "started", "finished", "failed", "cancelled", "cancelled", "rejected"):
        reporter.count(outcome)
    assert _snapshot(reporter).requests == Counters(started=3, finished=1, failed=1, cancelled=2, rejected=1)


def test_what_is_passed_on() -> None:
    """The snapshot says who this is and what it was given."""
    clock = FakeClock()
    reporter = _reporter(FakeDevice(), clock)
    clock.advance(12.5)
    snapshot = _snapshot(reporter, accepting=False)
    assert (snapshot.pid, snapshot.boot_id, snapshot.default_model) == (os.getpid(), "b", "m")
    assert (snapshot.accepting, snapshot.running, snapshot.queued, snapshot.slots) == (False, 1, 2, 3)
    assert (snapshot.uptime_s, snapshot.host, snapshot.shared_bytes) == (12.5, HOST, {"codec": 3})


def test_device_is_read_now_and_then() -> None:
    """Many pings cost the driver one reading; what it says is never older than that."""
    clock, device = FakeClock(), FakeDevice()
    reporter = _reporter(device, clock)
    assert _snapshot(reporter).device.ours_bytes == 0
    device.on_device["m"] = 100
    clock.advance(DEVICE_READING_S / 2)
    assert _snapshot(reporter).device.ours_bytes == 0
    clock.advance(DEVICE_READING_S / 2)
    assert _snapshot(reporter).device.ours_bytes == 100
