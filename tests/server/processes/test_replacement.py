"""Web workers that are replaced: one after the other, with a bound on failures and on the life of the old ones."""

import socket
from typing import Any

import pytest

from server.processes.replacement import (
    FAILED_REPLACEMENTS,
    RETIRED_S,
    ForkedWorker,
    Listeners,
    Replacements,
    RetiredWorkers,
)
from server.processes.watchdog import Watchdog
from tests.ports import free_port

STOP_S = 30.0


class FakeProcess:
    """A process that lives until it is told otherwise; `told` are the orders it has got."""

    def __init__(self, idx: int) -> None:
        self.idx = idx
        self.alive = True
        self.told: list[str] = []
        self.inner = self
        self.pid = None
        self.exitcode = 0

    def is_alive(self) -> bool:
        """True if the process has not ended."""
        return self.alive

    def terminate(self) -> None:
        """The order to stop."""
        self.told.append("stop")

    def kill(self) -> None:
        """The kill."""
        self.told.append("kill")


def forked(number: int, idx: int, now: float = 0.0) -> tuple[ForkedWorker, Any]:
    """A web worker at `idx`, and its process."""
    process: Any = FakeProcess(idx)
    return ForkedWorker(number, process, Watchdog(idx + 1, 1e9, now)), process


def test_one_after_the_other() -> None:
    """The next one is not begun before the successor serves; then all have been replaced."""
    replacements = Replacements()
    assert replacements.finished
    replacements.begin(2)
    for idx in (0, 1):
        assert replacements.next() == idx
        worker, _ = forked(idx, idx)
        replacements.successor = worker
        assert replacements.next() is None
        assert replacements.check(1.0) is None
        assert not replacements.finished
        worker.watchdog.beat.value = 2.0
        assert replacements.check(2.0) is worker
    assert replacements.next() is None
    assert replacements.finished


def test_successors_that_cannot_start() -> None:
    """After some attempts the old web workers stay, and the next reload tries again."""
    replacements = Replacements()
    replacements.begin(2)
    for _ in range(FAILED_REPLACEMENTS):
        assert replacements.next() == 0
        replacements.successor, process = forked(0, 0)
        process.alive = False
        assert replacements.check(1.0) is None
    assert replacements.finished
    replacements.begin(2)
    assert replacements.next() == 0


def test_a_web_worker_that_dies_while_its_successor_starts() -> None:
    """The successor is there for it; it is none of another web worker."""
    replacements = Replacements()
    replacements.begin(1)
    replacements.next()
    replacements.successor, _ = forked(0, 0)
    worker = replacements.successor
    assert replacements.take_successor(1) is None
    assert replacements.take_successor(0) is worker
    assert replacements.finished


def test_the_life_of_a_replaced_web_worker_is_bounded() -> None:
    """It may go on for RETIRED_S, is then told to stop once, and is killed when it does not."""
    retired = RetiredWorkers(STOP_S)
    worker, process = forked(7, 0)
    retired.add(0, worker, 0.0)
    for now in (0.0, RETIRED_S - 1, RETIRED_S, RETIRED_S + 1, RETIRED_S + STOP_S - 1, RETIRED_S + STOP_S):
        assert retired.check(now) == []
        orders = (now >= RETIRED_S) + (now >= RETIRED_S + STOP_S)
        assert process.told == ["stop", "kill"][:orders]
    process.alive = False
    assert retired.check(RETIRED_S + STOP_S + 1) == [7]
    assert retired.processes == []


def test_at_most_one_replaced_web_worker_goes_on_for_each() -> None:
    """Another replacement has the one before it stop; those of other web workers go on."""
    retired = RetiredWorkers(STOP_S)
    workers = [forked(number, idx) for number, idx in ((0, 0), (1, 1), (2, 0))]
    for worker, process in workers:
        retired.add(process.idx, worker, 10.0)
    retired.check(10.0)
    assert [process.told for _, process in workers] == [["stop"], [], []]


def test_a_replaced_web_worker_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watchdog still watches it."""
    retired = RetiredWorkers(STOP_S)
    worker, _ = forked(0, 0)
    looks: list[float] = []
    monkeypatch.setattr(worker.watchdog, "check", lambda _process, now: looks.append(now))
    retired.add(0, worker, 0.0)
    retired.check(5.0)
    assert looks == [5.0]


def test_the_sockets_share_the_port_and_close() -> None:
    """Each index has one socket, whichever process has it; a closed one is gone, and the next one is new."""
    port, listeners = free_port(), Listeners()
    first = listeners.holder(0, "127.0.0.1", port, 8).get_fd()
    second = listeners.holder(1, "127.0.0.1", port, 8).get_fd()
    assert listeners.holder(0, "127.0.0.1", port, 8).get_fd() == first
    assert listeners.descriptors(0) == (first, [second])
    listeners.close(0)
    assert listeners.descriptors(0) == (None, [second])
    listeners.close_all()
    assert listeners.descriptors(1) == (None, [])
    with socket.create_server(("127.0.0.1", port)):
        pass
