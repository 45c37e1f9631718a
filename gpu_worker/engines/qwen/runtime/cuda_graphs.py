"""CUDA graphs: functions recorded once, and replayed at the cost of one call.

It owns the recorded graphs and their memory, and knows nothing of what they compute.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Key = tuple[str, int, int]
"""What a function does, and two sizes."""


class CudaGraphs:
    """Recorded functions by key, in one memory pool.

    See streams.py for where they may be replayed.
    """

    def __init__(self) -> None:
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self.bytes = 0
        """Device memory of the pool, as the allocator counts it. What the driver makes of a graph is not in it."""

    def run(self, key: Key, function: Callable[[], None]) -> None:
        """Replay what was recorded under `key`, or call the function."""
        graph = self._graphs.get(key)
        if graph is None:
            function()
        else:
            graph.replay()

    def capture(
        self, functions: Mapping[Key, Callable[[], None]], *, capturing: torch.cuda.Stream, warming: torch.cuda.Stream
    ) -> None:
        """Run every function on `warming`, so that libraries make what they need, then record each on `recording`.

        In the order given: the largest first, so that the smaller ones fit into the same memory.
        When this returns, the device has done what was run. Where it raises, nothing is kept.
        """
        warming.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warming):
            for function in functions.values():
                function()
        warming.synchronize()
        # While a graph is recorded the allocator can give nothing back to make room. torch.cuda.graph would do this
        # before every graph, 50 to 90 times a model, and wait each time until no other model has work on the device.
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.stream(capturing):
                for key, function in functions.items():
                    self._graphs[key] = _record(function, pool)
        except BaseException:
            self.clear()
            raise
        self.bytes = sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))

    def clear(self) -> None:
        """Forget all graphs and their memory."""
        self._graphs.clear()
        self.bytes = 0


def _record(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The graph of `function`, recorded on the current stream."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other models go on speaking in another thread meanwhile. They may: the allocator tells a recording's requests
        # by the stream, and in this mode CUDA forbids what would disturb it to this thread alone.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        function()
        graph.capture_end()
    except BaseException:
        _abandon(graph, pool)
        raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a recording that failed.

    Where CUDA has given it up, torch's `capture_end` stops half way: the allocator would go on to believe
    that something is recorded, and never again give memory back when it runs out, nor this pool at all.
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # known once a recording has ended: the graph gives up its share of the pool by itself
    except RuntimeError:
        device = torch.cuda.current_device()
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):  # noqa: SLF001 -- no public way
            with contextlib.suppress(RuntimeError):
                end(device, pool)
    graph.reset()
