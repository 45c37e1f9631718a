"""The calls to CUDA and their order. What CUDA makes of them is tested on a GPU (tests/gpu)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.engines.qwen.runtime.cuda_graphs import GraphPool, Key, capture_graphs, warm_up


class FakeStream:
    """A stream with a name."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self._calls = calls

    def wait_stream(self, stream: "FakeStream") -> None:
        """List the call."""
        self._calls.append(f"{self.name} waits for {stream.name}")

    def synchronize(self) -> None:
        """List the call."""
        self._calls.append(f"synchronize {self.name}")


class FakeCuda:
    """The parts of torch.cuda that a capture uses; keeps a list of the calls. `invalidated`: so is a failed capture."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.invalidated = False
        self.current = FakeStream("default", self.calls)
        self.alive = 0
        self.handles = 0
        self.pool_bytes = 2
        self.driver_bytes = 100

    def new_handle(self) -> tuple[int, int]:
        """A handle of a pool, as torch numbers them."""
        self.handles += 1
        return (0, self.handles)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make it the current one."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def function(self, name: str, error: Exception | None = None) -> Callable[[], None]:
        """A function that raises `error`, if any. It takes 3 bytes of the pool, and its graph 10 of the driver."""

        def call() -> None:
            self.calls.append(f"{name} on {self.current.name}")
            if error:
                raise error
            self.pool_bytes += 3
            self.driver_bytes += 10

        return call


class FakeGraph:
    """A CUDAGraph of a FakeCuda."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._pool: object = None
        self._ended = False
        self._alive = True
        cuda.alive += 1

    def reset(self) -> None:
        """Free its memory, if that is not done."""
        if self._alive:
            self._alive = False
            self._cuda.alive -= 1

    __del__ = reset

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        """Check the mode: it must leave other threads alone."""
        assert capture_error_mode == "thread_local"
        self._pool = pool
        self._cuda.calls.append(f"begin on {self._cuda.current.name}")

    def capture_end(self) -> None:
        """As torch: an invalidated capture is not ended."""
        if self._cuda.invalidated:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._ended = True
        self._cuda.calls.append(f"end on {self._cuda.current.name}")

    def pool(self) -> object:
        """Known once the capture has ended."""
        if not self._ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """In place of torch.cuda."""
    fake = FakeCuda()

    def listed(name: str) -> Callable[..., None]:
        return lambda *_: fake.calls.append(name)

    for name, value in {
        "stream": fake.stream,
        "current_stream": lambda: fake.current,
        "current_device": lambda: 0,
        "empty_cache": listed("empty_cache"),
        "graph_pool_handle": fake.new_handle,
        "memory_snapshot": lambda _: [{"total_size": fake.pool_bytes}, {"total_size": 1}],
        "mem_get_info": lambda: (10_000 - fake.pool_bytes - fake.driver_bytes, 10_000),
        "memory_reserved": lambda: fake.pool_bytes,
        "CUDAGraph": lambda: FakeGraph(fake),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, listed(name), raising=False)
    return fake


def capture(
    cuda: FakeCuda, pool: GraphPool, **functions: Callable[[], None]
) -> tuple[dict[Key, torch.cuda.CUDAGraph], int]:
    """Capture functions by name."""
    stream: Any = FakeStream("capturing", cuda.calls)
    return capture_graphs({(name, 1, 0): function for name, function in functions.items()}, stream=stream, pool=pool)


def test_a_warm_up_waits_for_its_functions(cuda: FakeCuda) -> None:
    """They run on a stream of their own, behind what runs now."""
    stream: Any = FakeStream("warming", cuda.calls)
    warm_up([cuda.function("a"), cuda.function("b")], stream)
    assert cuda.calls == ["warming waits for default", "a on warming", "b on warming", "synchronize warming"]


def test_all_are_captured(cuda: FakeCuda) -> None:
    """The cache is emptied once, no other stream waits, and on the capture stream nothing runs but captures.

    The bytes are those that the pool grows by, and the driver's.
    """
    graphs, graph_bytes = capture(cuda, GraphPool(), a=cuda.function("a"), b=cuda.function("b"))
    assert cuda.calls == [
        "empty_cache",
        *("begin on capturing", "a on capturing", "end on capturing"),
        *("begin on capturing", "b on capturing", "end on capturing"),
    ]
    assert list(graphs) == [("a", 1, 0), ("b", 1, 0)]
    assert graph_bytes == 2 * (3 + 10)


def test_engines_share_a_pool_while_there_is_a_graph_in_it(cuda: FakeCuda) -> None:
    """A pool is freed with its last graph, and torch then refuses its handle: the next capture has a new one."""
    pool = GraphPool()
    assert pool.bytes() == 0
    capture(cuda, pool, a=cuda.function("a"))
    with pytest.raises(ValueError, match="made up"):
        capture(cuda, pool, b=cuda.function("b", ValueError("made up")))
    capture(cuda, pool, c=cuda.function("c"))
    assert cuda.handles == 1
    assert pool.bytes() == 2 + 1 + 2 * 3
    pool.release()
    assert pool.acquire() == (0, 1)
    for _ in range(2):
        pool.release()
    assert pool.bytes() == 0
    assert pool.acquire() == (0, 2)


@pytest.mark.parametrize("invalidated", [False, True])
def test_a_failed_capture_leaves_nothing(cuda: FakeCuda, *, invalidated: bool) -> None:
    """No graph is left, no capture under way, and no pool that the allocator believes to be in use."""
    function = cuda.function("b", torch.OutOfMemoryError("made up"))

    def failing() -> None:
        try:
            function()
        except torch.OutOfMemoryError:
            cuda.invalidated = invalidated
            raise

    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        capture(cuda, GraphPool(), a=cuda.function("a"), b=failing)
    ended = ["_cuda_endAllocateToPool", "_cuda_releasePool"] if invalidated else ["end on capturing"]
    assert cuda.calls[-len(ended) :] == ended
    assert cuda.alive == 0


def test_a_second_invalidated_capture_needs_a_new_process(cuda: FakeCuda) -> None:
    """The first one is the failure of its model alone; captures that fail without CUDA count for nothing."""
    pool = GraphPool()

    def invalidated() -> None:
        cuda.invalidated = True
        raise torch.OutOfMemoryError("made up")

    for _ in range(2):
        with pytest.raises(ValueError, match="made up"):
            capture(cuda, pool, a=cuda.function("a", ValueError("made up")))
    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        capture(cuda, pool, a=invalidated)
    cuda.invalidated = False
    capture(cuda, pool, a=cuda.function("a"))
    with pytest.raises(BrokenDeviceError, match="twice: made up"):
        capture(cuda, pool, a=invalidated)
    assert cuda.calls[-2:] == ["_cuda_endAllocateToPool", "_cuda_releasePool"]
