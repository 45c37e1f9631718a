"""Supervisor: it restarts a worker that died, stops it with the service, and gives up where a restart cannot help."""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from server.engine import Outage
from server.processes import restarts, worker_supervisor
from server.processes.restarts import LONGEST_PAUSE_S, SETTLED_S, RestartPauses
from server.processes.worker_supervisor import FIRST_START_S, Supervisor
from tests.system.service import eventually

LIMIT_S = 60.0
TIMEOUT_S = 30.0


class Supervised:
    """A supervisor of a Python program, which can write a number into a pipe when it starts."""

    def __init__(
        self, program: str, *, stop_timeout_s: float = LIMIT_S, on_outage: Callable[[Outage], None] | None = None
    ) -> None:
        self._read, write = os.pipe()
        os.set_inheritable(write, True)
        self._write = write
        self.given_up = threading.Event()
        self.outages: list[Outage] = []
        self.expected_s: list[float] = []
        """For each outage the time that it was expected to last when it began."""

        self.now = 0.0
        self.supervisor = Supervisor(
            [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{program}"],
            lambda: {"PIPE": f"/proc/{os.getpid()}/fd/{write}"},
            timeout_s=TIMEOUT_S,
            stop_timeout_s=stop_timeout_s,
            on_outage=on_outage or self._note,
            on_final=self.given_up.set,
            clock=lambda: self.now,
        )

    def _note(self, outage: Outage) -> None:
        self.outages.append(outage)
        self.expected_s.append(outage.retry_after_s())

    def next_number(self) -> int:
        """The number that the next worker writes: its pid, with WRITE_PID."""
        return int(os.read(self._read, 8))

    def let_time_pass(self, seconds: float) -> bool:
        """Move the clock on, a second in 20 ms, at most so far; True as soon as a worker writes its number."""
        for _ in range(int(seconds)):
            self.now += 1.0
            if select.select([self._read], [], [], 0.02)[0]:
                return True
        return False

    def close(self) -> None:
        """Stop the worker and close the pipe."""
        self.supervisor.stop()
        os.close(self._read)
        os.close(self._write)


WRITE_PID = "open(os.environ['PIPE'], 'w').write(f'{os.getpid():08}')\n"
WRITE_RESTARTS = "open(os.environ['PIPE'], 'w').write(f'{int(sys.argv[sys.argv.index(\"--restarts\") + 1]):08}')\n"
WAIT = WRITE_PID + "time.sleep(60)"
BEAT = 'beat = lambda byte: os.write(int(sys.argv[sys.argv.index("--heartbeat") + 1]), byte)\n'


@pytest.fixture
def start() -> Iterator[Callable[..., Supervised]]:
    """Starts supervisors, which are closed after the test."""
    started: list[Supervised] = []

    def start_one(program: str, **options: Any) -> Supervised:
        started.append(supervised := Supervised(program, **options))
        supervised.supervisor.start()
        return supervised

    yield start_one
    for supervised in started:
        supervised.close()


def is_running(pid: int) -> bool:
    """True if a process of that number exists."""
    return Path(f"/proc/{pid}").exists()


def test_a_killed_worker_is_replaced_at_once(start: Callable[..., Supervised]) -> None:
    """After kill -9, a new worker with another pid starts without a pause."""
    worker = start(WAIT)
    first = worker.next_number()
    assert worker.supervisor.pid == first
    os.kill(first, signal.SIGKILL)
    second = worker.next_number()
    assert second != first
    assert is_running(second)


def test_a_worker_that_exits_is_replaced(start: Callable[..., Supervised]) -> None:
    """A worker that exits with an error, which a new process may not have, is started again."""
    worker = start(WRITE_PID + "sys.exit(1)")
    assert worker.next_number() != worker.next_number()


@pytest.mark.slow
def test_a_silent_worker_writes_its_stacks_and_is_replaced(
    start: Callable[..., Supervised], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first byte, a worker may be silent for the timeout; a stopped one writes its stacks all the same."""
    monkeypatch.setattr(worker_supervisor, "_POLL_S", 0.01)
    stacks = tmp_path / "stacks"
    register = f"import faulthandler\nfaulthandler.register(signal.SIGUSR2, open({str(stacks)!r}, 'a'))\n"
    worker = start(BEAT + register + "beat(b's')\n" + WAIT)
    first = worker.next_number()
    os.kill(first, signal.SIGSTOP)
    assert not worker.let_time_pass(TIMEOUT_S - 5)
    assert is_running(first)
    while not worker.let_time_pass(100):
        pass
    assert worker.next_number() != first
    assert not is_running(first)
    assert "most recent call first" in stacks.read_text()
    assert "has died (no answer for 30 s)" in worker.outages[-1].reason


@pytest.mark.slow
def test_a_pause_of_the_whole_service_is_no_silence(
    start: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The supervisor, which was paused too, gives the worker the timeout once more."""
    monkeypatch.setattr(worker_supervisor, "_POLL_S", 0.01)
    monkeypatch.setattr(worker_supervisor, "STACKS_TIMEOUT_S", 0.0)
    worker = start(BEAT + "beat(b's')\n" + WAIT)
    first = worker.next_number()
    assert not worker.let_time_pass(2)
    worker.now += 10 * TIMEOUT_S
    assert not worker.let_time_pass(TIMEOUT_S - 5)
    assert worker.supervisor.pid == first


@pytest.mark.slow
def test_the_end_of_a_worker_is_no_silence(start: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has drained gives no more signs of life, and may end within the timeout of `stop`."""
    monkeypatch.setattr(worker_supervisor, "_POLL_S", 0.01)
    worker = start(BEAT + "signal.signal(signal.SIGTERM, lambda *_: None)\nbeat(b's')\n" + WAIT)
    first = worker.next_number()
    assert not worker.let_time_pass(2)
    stopping = threading.Thread(target=worker.supervisor.stop)
    stopping.start()
    worker.let_time_pass(TIMEOUT_S + 5)
    assert is_running(first)
    os.kill(first, signal.SIGKILL)
    stopping.join(LIMIT_S)
    assert not stopping.is_alive()


@pytest.mark.slow
def test_a_start_may_take_any_time(start: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch) -> None:
    """No silence counts before the first byte: an import or a download may take minutes."""
    monkeypatch.setattr(worker_supervisor, "_POLL_S", 0.01)
    worker = start(BEAT + WAIT)
    first = worker.next_number()
    assert not worker.let_time_pass(TIMEOUT_S + 10)
    assert is_running(first)


def test_an_outage_lasts_as_long_as_the_last_start(start: Callable[..., Supervised]) -> None:
    """A start is over when the preloaded models are there; the next outage is expected to last as long."""
    worker = start(
        BEAT
        + "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        + WRITE_PID
        + "beat(b's')\nsignal.sigwait({signal.SIGTERM})\nbeat(b'r')\ntime.sleep(60)",
        stop_timeout_s=0.1,
    )
    first = worker.next_number()
    assert worker.outages[0].reason == "The GPU worker is starting."
    assert worker.expected_s[0] == pytest.approx(FIRST_START_S, abs=1)
    worker.now += 17
    os.kill(first, signal.SIGTERM)
    eventually(lambda: worker.supervisor.start_s == 17.0, 60, "the start measured")
    os.kill(first, signal.SIGKILL)
    worker.next_number()
    assert worker.outages[-1].reason == "The GPU worker has died (SIGKILL) and is being restarted."
    assert worker.expected_s[-1] == pytest.approx(17, abs=1)


def test_a_full_disk_does_not_stop_the_restarts(start: Callable[..., Supervised]) -> None:
    """An outage that cannot be written costs its reason in the 503s, and nothing else."""

    def full(_outage: Outage) -> None:
        raise OSError(28, "No space left on device")

    worker = start(WAIT, on_outage=full)
    first = worker.next_number()
    os.kill(first, signal.SIGKILL)
    assert worker.next_number() != first


@pytest.mark.parametrize(("number", "hints"), [(signal.SIGKILL, True), (signal.SIGTERM, False)])
def test_the_log_says_where_a_kill_may_come_from(
    start: Callable[..., Supervised], number: signal.Signals, *, hints: bool
) -> None:
    """A kernel that is short of memory kills the largest process, and leaves no word in the log of the service."""
    with structlog.testing.capture_logs() as logs:
        worker = start(WAIT)
        os.kill(worker.next_number(), number)
        worker.next_number()
    (death,) = [line for line in logs if line["event"] == "worker_died"]
    assert ("memory runs out" in death.get("hint", "")) == hints


def test_a_worker_gets_the_number_of_restarts(start: Callable[..., Supervised]) -> None:
    """`--restarts` counts the workers before this one, so that the worker can report it in its snapshot."""
    worker = start(WRITE_RESTARTS + "sys.exit(1)")
    assert [worker.next_number(), worker.next_number()] == [0, 1]


@pytest.mark.parametrize("code", [2, 3])
def test_some_exit_codes_are_final(start: Callable[..., Supervised], code: int) -> None:
    """A worker that can never run is not started again; `on_final` is called."""
    worker = start(WRITE_PID + f"sys.exit({code})")
    assert worker.given_up.wait(LIMIT_S)
    assert worker.supervisor.exit_code == code


def test_stop_drains(start: Callable[..., Supervised]) -> None:
    """`stop` sends SIGTERM, waits for a worker that finishes slowly, and returns when it is gone."""
    program = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(0)))\n" + WAIT
    worker = start(program)
    pid = worker.next_number()
    worker.supervisor.stop()
    assert not is_running(pid)
    assert worker.supervisor.pid is None


def test_stop_kills_a_worker_that_does_not_end(start: Callable[..., Supervised]) -> None:
    """A worker that ignores SIGTERM is killed after `stop_timeout_s`, with the processes that it started."""
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.fork()\n" + WAIT
    worker = start(program, stop_timeout_s=0.2)
    ends = [os.pidfd_open(worker.next_number()), os.pidfd_open(worker.next_number())]
    worker.supervisor.stop()
    for end in ends:
        assert select.select([end], [], [], LIMIT_S)[0] == [end]
        os.close(end)


def test_stop_during_a_pause_is_prompt(start: Callable[..., Supervised], monkeypatch: pytest.MonkeyPatch) -> None:
    """`stop` does not wait for the end of a pause before the next start."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 30.0)
    worker = start(WRITE_PID + "sys.exit(1)")
    for _ in range(2):  # the pause after the second early death is FIRST_PAUSE_S
        worker.next_number()
    stopping = threading.Thread(target=worker.supervisor.stop)
    stopping.start()
    stopping.join(1.5)
    assert not stopping.is_alive()


def test_the_worker_has_a_session_of_its_own(start: Callable[..., Supervised]) -> None:
    """A terminal's Ctrl-C does not reach the worker, whose streams must end first."""
    worker = start(WAIT)
    assert os.getsid(worker.next_number()) != os.getsid(0)


def test_a_failed_start_is_tried_again() -> None:
    """A program that does not exist is tried again after a pause, and `stop` still works."""
    supervisor = Supervisor(
        ["/nonexistent/python"], dict, timeout_s=TIMEOUT_S, stop_timeout_s=1, on_final=lambda _code: None
    )
    supervisor.start()
    supervisor.stop()
    assert supervisor.pid is None


def test_pauses_grow() -> None:
    """No pause after a first death, then 0.5 s, twice as long each time, 30 s at most; a long life starts anew."""
    pauses = RestartPauses()
    assert [pauses.after_death(1.0) for _ in range(6)] == [0, 0.5, 1, 2, 4, 8]
    assert [pauses.after_death(1.0) for _ in range(50)][-1] == LONGEST_PAUSE_S
    assert [pauses.after_death(lived_s) for lived_s in (SETTLED_S, 1.0, 1.0)] == [0, 0, 0.5]


def test_after_a_long_life_there_is_no_pause(start: Callable[..., Supervised]) -> None:
    """A worker that ran for a minute is replaced at once, however many died before."""
    worker = start(WAIT)
    for _ in range(6):  # without the reset, the last pauses would take 15 s together
        pid = worker.next_number()
        worker.now += SETTLED_S
        os.kill(pid, signal.SIGKILL)
    worker.next_number()
