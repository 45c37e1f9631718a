"""CUDA graphs: functions captured once, and replayed at the cost of one call.

Owns the capture: warm-up, memory pools, and what a failed capture leaves behind. It keeps no graphs.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from gpu_worker.engines.faults import BrokenDeviceError

Key = tuple[str, int, int]
"""The name of a captured function, and two sizes of its input."""


class GraphPool:
    """Device memory of graphs that never run at the same time: those of all engines that are captured on one stream.

    For an engine each, the codec's graphs alone would take about 1 GB at 64 slots (derived from their intermediates).
    torch frees a pool with its last graph, and then refuses the pool's handle. So users are counted.
    Not for several threads.
    """

    def __init__(self) -> None:
        self._users = 0
        self._handle: Any = None
        self.captures_given_up = 0
        """Captures that CUDA has invalidated. Each leaves something in torch's host allocator for good."""

    def acquire(self) -> Any:
        """The handle to capture with, for one more user."""
        if not self._users:
            self._handle = torch.cuda.graph_pool_handle()
        self._users += 1
        return self._handle

    def release(self) -> None:
        """One user less; its graphs are freed."""
        self._users -= 1

    def bytes(self) -> int:
        """The allocator's figure of the memory in use."""
        if not self._users:
            return 0
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._handle))


def warm_up(functions: Iterable[Callable[[], None]], stream: torch.cuda.Stream) -> None:
    """Run functions on `stream`, and wait for them: libraries then have allocated and loaded what a capture needs."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    stream.synchronize()


def capture_graphs(
    functions: Mapping[Key, Callable[[], None]], *, stream: torch.cuda.Stream, pool: GraphPool
) -> tuple[dict[Key, torch.cuda.CUDAGraph], int]:
    """Capture functions as graphs, in the order given. Returns the graphs, and the device bytes that they take.

    Pass the largest first, so that the smaller ones fit into the same memory. Each function has run in this thread.
    See cuda_streams.py for where the graphs may be replayed. The caller is a user of `pool` while it keeps the graphs.
    The bytes are the growth of the pool, and what the driver allocates: about 10 KB for each kernel of a graph.
    """
    # During a capture the allocator cannot return memory to make room. torch.cuda.graph would call empty_cache before
    # every graph, 50 to 90 times a model, and each time wait until no model has work on the device.
    torch.cuda.empty_cache()
    handle = pool.acquire()
    before, taken_before = pool.bytes(), _taken_by_driver()
    graphs: dict[Key, torch.cuda.CUDAGraph] = {}
    try:
        with torch.cuda.stream(stream):
            for key, function in functions.items():
                graphs[key] = _capture(function, pool, handle)
    except BaseException:
        graphs.clear()  # their memory would stay in use for as long as the error's traceback
        pool.release()
        raise
    return graphs, pool.bytes() - before + max(0, _taken_by_driver() - taken_before)


def _taken_by_driver() -> int:
    """Bytes of the device that are in use, but not for torch's allocator."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _capture(function: Callable[[], None], pool: GraphPool, handle: Any) -> torch.cuda.CUDAGraph:
    """The graph of `function`, captured on the current stream.

    Raises:
        BrokenDeviceError: CUDA has invalidated a capture for the second time. After the first, all is as before, but
            for an entry in torch's host allocator that refers to the capture: so a process may have one.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # Meanwhile other models run in another thread. That is safe: the allocator knows the requests of a capture
        # by their stream, and in this mode CUDA forbids disturbing calls to this thread alone.
        graph.capture_begin(pool=handle, capture_error_mode="thread_local")
        function()
        graph.capture_end()
    except BaseException as error:
        if not _abandon(graph, handle):
            pool.captures_given_up += 1
            if pool.captures_given_up > 1:
                raise BrokenDeviceError(f"CUDA gave up the capture of a graph twice: {error}") from error
        raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, handle: Any) -> bool:
    """End a capture that failed. Returns False if CUDA has invalidated the capture.

    Then torch's `capture_end` stops half-way, and the allocator would assume for ever
    that a capture is running: it would neither return memory when memory runs out, nor ever free this pool.
    """
    ended = True
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # succeeds if the capture has ended: then the graph releases its share of the pool by itself
    except RuntimeError:
        ended = False
        device = torch.cuda.current_device()
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):  # noqa: SLF001 -- no public way
            with contextlib.suppress(RuntimeError):
                end(device, handle)
    graph.reset()
    return ended
