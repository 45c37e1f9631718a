"""CUDA graphs: functions captured once, and replayed at the cost of one call.

Owns the capture: warm-up, memory pool, streams, and what a failed capture leaves behind. It keeps no graphs.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Key = tuple[str, int, int]
"""What a function does, and two sizes."""


def capture_graphs(
    functions: Mapping[Key, Callable[[], None]], *, capturing: torch.cuda.Stream, warming: torch.cuda.Stream
) -> tuple[dict[Key, torch.cuda.CUDAGraph], int]:
    """Capture functions as graphs that share one memory pool; returns the graphs and the pool's bytes.

    Every function first runs on `warming`, so that libraries allocate what they need; then each is captured on
    `capturing`, in the order given. Pass the largest first, so that the smaller ones fit into the same memory.
    When this returns, the device has finished the warm-up. See cuda_streams.py for where the graphs may be replayed.
    The bytes are the allocator's figure. They do not include what the driver allocates for a graph.
    """
    warming.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warming):
        for function in functions.values():
            function()
    warming.synchronize()
    # During a capture the allocator cannot return memory to make room. torch.cuda.graph would call empty_cache before
    # every graph, 50 to 90 times a model, and each time wait until no model has work on the device.
    torch.cuda.empty_cache()
    pool = torch.cuda.graph_pool_handle()
    graphs: dict[Key, torch.cuda.CUDAGraph] = {}
    try:
        with torch.cuda.stream(capturing):
            for key, function in functions.items():
                graphs[key] = _capture(function, pool)
    except BaseException:
        graphs.clear()  # their memory would stay in use for as long as the error's traceback
        raise
    return graphs, sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(pool))


def _capture(function: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """The graph of `function`, captured on the current stream."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Meanwhile other models run in another thread. That is safe: the allocator knows the requests of a capture
        # by their stream, and in this mode CUDA forbids disturbing calls to this thread alone.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        function()
        graph.capture_end()
    except BaseException:
        _abandon(graph, pool)
        raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed.

    If CUDA has invalidated the capture, torch's `capture_end` stops half-way. Then the allocator would assume for ever
    that a capture is running: it would neither return memory when memory runs out, nor ever free this pool.
    """
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    try:
        graph.pool()  # succeeds if the capture has ended: then the graph releases its share of the pool by itself
    except RuntimeError:
        device = torch.cuda.current_device()
        for end in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):  # noqa: SLF001 -- no public way
            with contextlib.suppress(RuntimeError):
                end(device, pool)
    graph.reset()
