"""The worker child: back after every death, gone after every stop, given up when nothing would help."""

import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.processes.worker_supervisor import LONGEST_PAUSE_S, SETTLED_S, Supervisor, pause_before_restart

LIMIT_S = 10.0


class Nest:
    """A supervisor whose children write their pid into a pipe as they start."""

    def __init__(self, program: str, *, stop_timeout_s: float = LIMIT_S) -> None:
        self._read, write = os.pipe()
        os.set_inheritable(write, True)
        self._write = write
        self.given_up: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.now = 0.0
        self.supervisor = Supervisor(
            [sys.executable, "-S", "-c", f"import os, signal, sys, time\n{program}"],
            {"PIPE": f"/proc/{os.getpid()}/fd/{write}"},
            stop_timeout_s=stop_timeout_s,
            on_final=self.given_up.put,
            clock=lambda: self.now,
        )

    def born(self) -> int:
        """The pid of the next child."""
        return int(os.read(self._read, 8))

    def close(self) -> None:
        """End it all."""
        self.supervisor.stop()
        os.close(self._read)
        os.close(self._write)


SAY_PID = "open(os.environ['PIPE'], 'w').write(f'{os.getpid():08}')\n"
SAY_RESTARTS = "open(os.environ['PIPE'], 'w').write(f'{int(sys.argv[sys.argv.index(\"--restarts\") + 1]):08}')\n"
WAIT = SAY_PID + "time.sleep(60)"


@pytest.fixture
def nests() -> Iterator[list[Nest]]:
    """Nests that are closed after the test."""
    made: list[Nest] = []
    yield made
    for nest in made:
        nest.close()


def is_running(pid: int) -> bool:
    """Whether a process of that number exists."""
    return Path(f"/proc/{pid}").exists()


def test_a_killed_worker_is_replaced_at_once(nests: list[Nest]) -> None:
    """After kill -9, a new one with another pid starts without a pause, and is counted."""
    nests.append(nest := Nest(WAIT))
    nest.supervisor.start()
    first = nest.born()
    assert nest.supervisor.pid == first
    os.kill(first, signal.SIGKILL)
    second = nest.born()
    assert second != first
    assert nest.supervisor.restarts == 1
    assert is_running(second)


def test_a_worker_that_ends_by_itself_is_replaced(nests: list[Nest]) -> None:
    """Also one that ended in good order, or with an error that a new process may not have."""
    nests.append(nest := Nest(SAY_PID + "sys.exit(1)"))
    nest.supervisor.start()
    assert nest.born() != nest.born()


def test_a_worker_is_told_how_many_there_were_before(nests: list[Nest]) -> None:
    """Each hears its number, which it can then tell to everyone alike."""
    nests.append(nest := Nest(SAY_RESTARTS + "sys.exit(1)"))
    nest.supervisor.start()
    assert [nest.born(), nest.born()] == [0, 1]


@pytest.mark.parametrize("code", [2, 3])
def test_wrong_settings_are_final(nests: list[Nest], code: int) -> None:
    """A worker that says it can never run is not started again, and the service is told."""
    nests.append(nest := Nest(SAY_PID + f"sys.exit({code})"))
    nest.supervisor.start()
    assert nest.given_up.get(timeout=LIMIT_S) == code
    assert nest.supervisor.exit_code == code
    assert nest.supervisor.restarts == 0


def test_stop_drains(nests: list[Nest]) -> None:
    """SIGTERM first: a worker that takes its time to finish is waited for, and is gone afterwards."""
    program = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(0)))\n" + WAIT
    nests.append(nest := Nest(program))
    nest.supervisor.start()
    pid = nest.born()
    nest.supervisor.stop()
    assert not is_running(pid)
    assert nest.supervisor.pid is None
    assert nest.supervisor.restarts == 0


def test_stop_kills_what_does_not_end(nests: list[Nest]) -> None:
    """A worker that ignores SIGTERM is killed once its time is over, with what it had started."""
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.fork()\n" + WAIT
    nests.append(nest := Nest(program, stop_timeout_s=0.2))
    nest.supervisor.start()
    ends = [os.pidfd_open(nest.born()), os.pidfd_open(nest.born())]
    nest.supervisor.stop()
    for end in ends:
        assert select.select([end], [], [], LIMIT_S)[0] == [end]
        os.close(end)


def test_stop_during_a_pause_is_prompt(nests: list[Nest]) -> None:
    """A supervisor that waits before the next start does not make the service wait with it."""
    nests.append(nest := Nest(SAY_PID + "sys.exit(1)"))
    nest.supervisor.start()
    for _ in range(4):  # the pause after the fourth death is 2 s
        nest.born()
    stopping = threading.Thread(target=nest.supervisor.stop)
    stopping.start()
    stopping.join(1.5)
    assert not stopping.is_alive()


def test_the_worker_has_a_session_of_its_own(nests: list[Nest]) -> None:
    """A terminal's Ctrl-C reaches the service and not the worker, which must first let streams end."""
    nests.append(nest := Nest(WAIT))
    nest.supervisor.start()
    assert os.getsid(nest.born()) != os.getsid(0)


def test_a_program_that_is_not_there_is_tried_again() -> None:
    """A start that fails is a death like any other, and stop still works."""
    supervisor = Supervisor(["/nonexistent/python"], {}, stop_timeout_s=1, on_final=lambda _code: None)
    supervisor.start()
    supervisor.stop()
    assert supervisor.pid is None


def test_pauses_grow() -> None:
    """No pause after a first death, then 0.5 s, twice as long each time, 30 s at most."""
    assert [pause_before_restart(deaths) for deaths in range(7)] == [0, 0, 0.5, 1, 2, 4, 8]
    assert pause_before_restart(50) == LONGEST_PAUSE_S


def test_a_long_life_is_a_fresh_start(nests: list[Nest]) -> None:
    """After a minute of health, the next death is again answered at once, however many there were before."""
    nests.append(nest := Nest(WAIT))
    nest.supervisor.start()
    for _ in range(6):  # without the reset, the last pauses would take 15 s together
        pid = nest.born()
        nest.now += SETTLED_S
        os.kill(pid, signal.SIGKILL)
    nest.born()
    assert nest.supervisor.restarts == 6
