"""Silence and Watchdog: which silence is too long, and how the process of a web worker ends that hangs."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from server.processes.watchdog import STACKS_TIMEOUT_S, START_TIMEOUT_S, Silence, Watchdog
from tests.system.service import eventually

TIMEOUT_S = 30.0
PROGRAM = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR2, open(sys.argv[1], "w"))
print("ready", flush=True)
time.sleep(60)
"""


def test_silence_counts_from_the_first_sign() -> None:
    """Without a sign of life no silence is too long; after one, the time since the last sign counts."""
    silence = Silence(0.0)
    assert not any(silence.exceeds(TIMEOUT_S, float(now)) for now in range(100))
    silence.heard(100.0)
    silence.heard(90.0)  # old news
    assert next(now for now in range(101, 140) if silence.exceeds(TIMEOUT_S, float(now))) == 131


def test_a_pause_of_the_observer_is_no_silence() -> None:
    """After a look that comes late, the other process has the whole time once more."""
    silence = Silence(0.0)
    silence.heard(0.0)
    assert not silence.exceeds(TIMEOUT_S, 1.0)
    assert not silence.exceeds(TIMEOUT_S, 500.0)
    assert next(now for now in range(501, 540) if silence.exceeds(TIMEOUT_S, float(now))) == 531


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes its stacks into the file `stacks` at SIGUSR2."""
    command = [sys.executable, "-S", "-c", PROGRAM, str(tmp_path / "stacks")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_stopped_web_worker_is_killed(process: subprocess.Popen[str], tmp_path: Path) -> None:
    """Past the timeout it is continued and writes its stacks; a second later it is killed. The log says why."""
    process.send_signal(signal.SIGSTOP)
    watchdog = Watchdog(2, TIMEOUT_S, 0.0)
    watchdog.beat.value = 10.0
    with capture_logs() as lines:
        for now in range(1, 41):
            watchdog.check(process, float(now))
        assert (lines, watchdog.hung_s) == ([], None)
        watchdog.check(process, 41.0)
    assert [(line["event"], line["worker"], line["pid"]) for line in lines] == [("web_worker_hangs", 2, process.pid)]
    assert watchdog.hung_s == TIMEOUT_S
    stacks = tmp_path / "stacks"
    eventually(lambda: "most recent call first" in stacks.read_text(), 60, "the stacks")
    watchdog.check(process, 41.0 + STACKS_TIMEOUT_S / 2)
    assert process.poll() is None
    watchdog.check(process, 41.0 + STACKS_TIMEOUT_S)
    assert process.wait(60) == -signal.SIGKILL
    watchdog.check(process, 50.0)


def test_a_web_worker_that_beats_is_left_alone(process: subprocess.Popen[str]) -> None:
    """A beat every ten seconds is enough for any time."""
    watchdog = Watchdog(1, TIMEOUT_S, 0.0)
    for now in range(1, 500):
        watchdog.beat.value = float(now - now % 10)
        watchdog.check(process, float(now))
    assert watchdog.hung_s is None


def test_a_start_has_more_time(process: subprocess.Popen[str]) -> None:
    """A web worker that has not served yet gets a minute at least, and is replaced after that."""
    watchdog = Watchdog(1, TIMEOUT_S, 0.0)
    assert not watchdog.has_served
    for now in range(1, int(START_TIMEOUT_S) + 1):
        watchdog.check(process, float(now))
    assert watchdog.hung_s is None
    watchdog.check(process, START_TIMEOUT_S + 1)
    assert watchdog.hung_s == START_TIMEOUT_S
