"""One background thread that handles submitted items one after the other.

SerialThread owns its queue and its thread. It knows nothing of the items: errors, reports and results are the
business of the function that handles them.
"""

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog

Item = TypeVar("Item")

log = structlog.get_logger(__name__)


class SerialThread(Generic[Item]):
    """Calls `handle(item)` for every submitted item, in the order of submission, on one daemon thread.

    The first `submit` starts the thread. `submit` never blocks; one thread at a time may call it.
    An item must not be None.

    `close` ends the thread after the items submitted before it have been handled. `on_close` then runs, as the last
    thing on the thread. `submit` raises RuntimeError after `close`.

    An exception that `handle` raises ends the thread: SerialThread calls `on_error(error)` on it and drops all items
    behind the failed one, and those submitted later. `on_close` does not run. An error of one item that must not stop
    the others has to be caught in `handle`.
    """

    def __init__(
        self,
        name: str,
        handle: Callable[[Item], None],
        *,
        on_error: Callable[[Exception], None] = lambda _error: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`name` is the thread's name, for logs and debuggers. SerialThread logs an error before `on_error`."""
        self._handle = handle
        self._on_error = on_error
        self._on_close = on_close
        self._items: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, item: Item) -> None:
        """Handle `item` once all items before it have been handled."""
        if self._closed:
            raise RuntimeError(f"the thread {self._thread.name!r} is closed")
        self._items.put(item)
        if self._thread.ident is None:
            self._thread.start()

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more items, and wait up to `timeout_s` (None: forever) for the submitted ones.

        After the timeout the thread goes on; as a daemon it does not keep the process alive.
        """
        self._closed = True
        self._items.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            try:
                self._handle(item)
            except Exception as error:
                log.exception("serial_thread_failed", thread=self._thread.name)
                self._on_error(error)
                return
            del item  # nothing is kept alive while the thread waits for the next item
        self._on_close()
