"""SerialThread handles items in order on one thread, ends behind them, and stops at the first error."""

import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from gpu_worker.serial_thread import SerialThread

TIMEOUT_S = 10.0


class _Handled:
    """Remembers handled items and their threads; `fail_on` raises; `gate`, once closed, holds the thread."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self.threads: set[str] = set()
        self.closed_after: list[str] | None = None
        self.errors: list[Exception] = []
        self.failed = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def handle(self, item: str) -> None:
        assert self.gate.wait(TIMEOUT_S)
        if item == "bad":
            raise ValueError(item)
        self.items.append(item)
        self.threads.add(threading.current_thread().name)

    def on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self.failed.set()

    def on_close(self) -> None:
        self.closed_after = list(self.items)
        self.threads.add(threading.current_thread().name)


@pytest.fixture
def handled() -> _Handled:
    """The function's side of the thread."""
    return _Handled()


@pytest.fixture
def thread(handled: _Handled) -> Iterator[SerialThread[str]]:
    """A thread that the first item starts."""
    thread = SerialThread("serial", handled.handle, on_error=handled.on_error, on_close=handled.on_close)
    yield thread
    handled.gate.set()
    thread.close(TIMEOUT_S)


def test_handles_every_item_in_order_on_its_own_thread(thread: SerialThread[str], handled: _Handled) -> None:
    """`close` waits for all items; `on_close` is the thread's last act."""
    for item in "abcd":
        thread.submit(item)

    thread.close(TIMEOUT_S)

    assert handled.items == ["a", "b", "c", "d"]
    assert handled.closed_after == handled.items
    assert handled.threads == {"serial"}


def test_an_error_ends_the_thread(thread: SerialThread[str], handled: _Handled) -> None:
    """The error is logged and given to `on_error`; later items are dropped, and submitting one is no error."""
    with capture_logs() as logs:
        for item in ("a", "bad", "b"):
            thread.submit(item)
        assert handled.failed.wait(TIMEOUT_S)

    thread.submit("c")
    thread.close(TIMEOUT_S)
    assert handled.items == ["a"]
    assert [str(error) for error in handled.errors] == ["bad"]
    assert handled.closed_after is None
    assert [(entry["event"], entry["thread"]) for entry in logs] == [("serial_thread_failed", "serial")]


def test_takes_no_item_after_close(thread: SerialThread[str], handled: _Handled) -> None:
    """An item that would never be handled is refused."""
    thread.close(TIMEOUT_S)

    with pytest.raises(RuntimeError, match="serial"):
        thread.submit("late")

    thread.close(TIMEOUT_S)
    assert handled.items == []


def test_close_waits_no_longer_than_its_timeout(thread: SerialThread[str], handled: _Handled) -> None:
    """A hanging item delays the end by the timeout; it still ends when it can."""
    handled.gate.clear()
    thread.submit("slow")

    thread.close(timeout_s=0.01)

    assert handled.items == []
    handled.gate.set()
    thread.close(TIMEOUT_S)
    assert handled.items == ["slow"]


def test_starts_with_the_first_item(thread: SerialThread[str], handled: _Handled) -> None:
    """Before the first item there is no thread, so a start-up that fails half-way leaves none behind."""
    running = {each.name for each in threading.enumerate()}
    assert "serial" not in running
    thread.close()
    assert handled.closed_after is None
