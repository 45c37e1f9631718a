"""What is asked of CUDA, and in which order; what CUDA makes of it is tested on a GPU (tests/gpu)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.runtime.cuda_graphs import CudaGraphs

POOL = (0, 7)


class FakeStream:
    """A stream with a name."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self._calls = calls

    def wait_stream(self, stream: "FakeStream") -> None:
        """Note it."""
        self._calls.append(f"{self.name} waits for {stream.name}")

    def synchronize(self) -> None:
        """Note it."""
        self._calls.append(f"synchronize {self.name}")


class FakeCuda:
    """What Graphs uses of torch.cuda; notes what it is asked. `given_up`: CUDA gives up a recording that fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.given_up = False
        self.current = FakeStream("default", self.calls)
        self.alive = 0

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        """Make it the current one."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def function(self, name: str, error: Exception | None = None) -> Callable[[], None]:
        """A function that raises `error`, if any, the second time: when it is recorded."""

        def call() -> None:
            again = f"{name} on warming" in self.calls
            self.calls.append(f"{name} on {self.current.name}")
            if again and error:
                raise error

        return call


class FakeGraph:
    """A CUDAGraph of a FakeCuda."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._ended = False
        self._alive = True
        cuda.alive += 1

    def reset(self) -> None:
        """Free what it holds, if it is not free."""
        if self._alive:
            self._alive = False
            self._cuda.alive -= 1

    __del__ = reset

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        """In the mode that leaves other threads alone."""
        assert (pool, capture_error_mode) == (POOL, "thread_local")
        self._cuda.calls.append(f"begin on {self._cuda.current.name}")

    def capture_end(self) -> None:
        """As torch: where CUDA has given up, nothing is ended."""
        if self._cuda.given_up:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._ended = True
        self._cuda.calls.append(f"end on {self._cuda.current.name}")

    def pool(self) -> object:
        """Known once it has ended."""
        if not self._ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return POOL

    def replay(self) -> None:
        """Note it."""
        self._cuda.calls.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """In the place of torch's."""
    fake = FakeCuda()

    def noted(name: str) -> Callable[..., None]:
        return lambda *_: fake.calls.append(name)

    for name, value in {
        "stream": fake.stream,
        "current_stream": lambda: fake.current,
        "current_device": lambda: 0,
        "empty_cache": noted("empty_cache"),
        "graph_pool_handle": lambda: POOL,
        "memory_snapshot": lambda pool: [{"total_size": 2}, {"total_size": 3}] if pool == POOL else [],
        "CUDAGraph": lambda: FakeGraph(fake),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, noted(name), raising=False)
    return fake


def capture(graphs: CudaGraphs, cuda: FakeCuda, **functions: Callable[[], None]) -> None:
    """Capture functions by name."""
    streams: Any = {name: FakeStream(name, cuda.calls) for name in ("capturing", "warming")}
    graphs.capture({(name, 1, 0): function for name, function in functions.items()}, **streams)


def test_all_are_warmed_up_then_recorded(cuda: FakeCuda) -> None:
    """Memory is given back once, nobody else's stream waits, and nothing runs where it is recorded but recordings."""
    graphs = CudaGraphs()
    capture(graphs, cuda, a=cuda.function("a"), b=cuda.function("b"))
    assert cuda.calls == [
        "warming waits for default",
        "a on warming",
        "b on warming",
        "synchronize warming",
        "empty_cache",
        *("begin on capturing", "a on capturing", "end on capturing"),
        *("begin on capturing", "b on capturing", "end on capturing"),
    ]
    assert graphs.bytes == 5


def test_what_was_recorded_is_replayed(cuda: FakeCuda) -> None:
    """Under its key; anything else is called, and everything is once the graphs are forgotten."""
    graphs = CudaGraphs()
    capture(graphs, cuda, a=cuda.function("a"))
    cuda.calls.clear()
    graphs.run(("a", 1, 0), cuda.function("a"))
    graphs.run(("a", 2, 0), cuda.function("another a"))
    assert cuda.calls == ["replay", "another a on default"]
    graphs.clear()
    graphs.run(("a", 1, 0), cuda.function("a"))
    assert cuda.calls[-1] == "a on default"
    assert (graphs.bytes, cuda.alive) == (0, 0)


@pytest.mark.parametrize("given_up", [False, True])
def test_a_failed_recording_leaves_nothing(cuda: FakeCuda, *, given_up: bool) -> None:
    """No graph, no recording under way, no pool that the allocator believes to be in use."""
    graphs = CudaGraphs()
    function = cuda.function("b", torch.OutOfMemoryError("made up"))

    def failing() -> None:
        try:
            function()
        except torch.OutOfMemoryError:
            cuda.given_up = given_up
            raise

    with pytest.raises(torch.OutOfMemoryError, match="made up"):
        capture(graphs, cuda, a=cuda.function("a"), b=failing)
    ended = ["_cuda_endAllocateToPool", "_cuda_releasePool"] if given_up else ["end on capturing"]
    assert cuda.calls[-len(ended) :] == ended
    assert (graphs.bytes, cuda.alive) == (0, 0)
    graphs.run(("a", 1, 0), cuda.function("a"))
    assert cuda.calls[-1].startswith("a on ")
