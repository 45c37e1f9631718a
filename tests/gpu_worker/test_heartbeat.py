"""Heartbeat: bytes for the supervisor, or an end of the process by itself; either way the stacks are written."""

import os
import subprocess
import sys

import pytest

from gpu_worker.heartbeat import Heartbeat
from tests.gpu_worker.fakes import FakeClock


def test_a_byte_a_second() -> None:
    """However often the loop turns, the supervisor gets one byte a second; the byte tells when the start is over."""
    read, write = os.pipe()
    clock = FakeClock()
    heartbeat = Heartbeat(write, 30.0, clock)
    for turn in range(30):
        heartbeat.beat(ready=turn >= 15)
        clock.advance(0.1)
    assert os.read(read, 100) == b"ssrr"  # the end of the start is told at once
    for _ in range(100_000):  # more than the pipe holds: the loop never waits for its supervisor
        clock.advance(1.0)
        heartbeat.beat(ready=True)
    os.close(read)
    clock.advance(1.0)
    heartbeat.beat(ready=True)
    os.close(write)


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["time.sleep(60)", "[0 for _ in iter(int, 1)]", "re.match('(a*)*b', 'a' * 99)"])
def test_without_a_supervisor_the_process_ends_itself(hang: str) -> None:
    """A loop that sleeps, computes, or holds the interpreter's lock: stacks, then exit code 1."""
    program = f"""
import re, time
from gpu_worker.heartbeat import Heartbeat
heartbeat = Heartbeat(None, 0.3)
heartbeat.beat(ready=True)
def stuck(): {hang}
stuck()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "in stuck" in done.stderr


def test_the_end_is_no_silence() -> None:
    """After `stop` the process may take its time to end."""
    program = """
import time
from gpu_worker.heartbeat import Heartbeat
heartbeat = Heartbeat(None, 0.1)
heartbeat.beat(ready=True)
heartbeat.stop()
time.sleep(0.3)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
