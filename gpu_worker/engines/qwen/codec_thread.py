"""A thread on which the codec decodes large chunks, beside the frames of the synthesis thread: on a CPU alone.

Frames wait for memory, the codec computes: where there are cores to spare, both together take less than their sum.
CodecThread owns the thread and the division of the cores. codec_thread_trial.py decides whether an engine has one.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

import torch

from gpu_worker.serial_thread import SerialThread

T = TypeVar("T")


class CodecThread(Generic[T]):
    """Runs one call at a time. All methods belong to the thread that steps the engine."""

    def __init__(
        self, *, threads: int, codec_threads: int, streams: int, wake: Callable[[], None] = lambda: None
    ) -> None:
        """`threads`: those that compute, together. While the codec has a call, `codec_threads` of them are its own.

        `streams`: the most of one call. More would not be done before their next chunks are due.
        `wake` is called from any thread when a call is done.
        """
        self.streams = streams
        self._all = threads
        self._codec_threads = codec_threads
        self._wake = wake
        self._future: Future[T] | None = None
        self._thread = SerialThread("codec", self._handle)

    @property
    def busy(self) -> bool:
        """True from `start` until `take`."""
        return self._future is not None

    def start(self, call: Callable[[], T]) -> None:
        """Run `call` on the thread. There must be no other call."""
        self._future = Future()
        self._thread.submit((call, self._future))
        self._divide()

    def done(self) -> bool:
        """True if `take` has the result of a call without waiting."""
        return self._future is not None and self._future.done()

    def take(self) -> T:
        """Wait for the call, and return its result or raise its error. The thread is free again."""
        future, self._future = self._future, None
        if future is None:
            raise RuntimeError("the codec's thread has no call")
        try:
            return future.result()
        finally:
            self._divide()

    def wait(self) -> None:
        """Wait for the call, if there is one. `take` has its result."""
        if self._future is not None:
            wait([self._future])

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Within it, the calling thread computes with the threads that the codec leaves."""
        self._divide()
        try:
            yield
        finally:
            torch.set_num_threads(self._all)

    def drop(self) -> None:
        """Wait for the call, if there is one, and drop its result."""
        self.wait()
        self._future = None

    def close(self) -> None:
        """As `drop`, and end the thread."""
        self.drop()
        self._thread.close()

    def _divide(self) -> None:
        torch.set_num_threads(self._all - self._codec_threads if self.busy and not self.done() else self._all)

    def _handle(self, item: tuple[Callable[[], T], Future[T]]) -> None:
        call, future = item
        torch.set_num_threads(self._codec_threads)
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 -- `take` raises it
            # The step may be tried again: the tensors of this try must be freed before.
            traceback.clear_frames(error.__traceback__)
            future.set_exception(error)
            del call, future, item  # the error's traceback refers to this frame
        self._wake()
