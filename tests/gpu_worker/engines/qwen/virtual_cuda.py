"""A CUDA device without a GPU: streams, events and graphs on a virtual clock, with tensors on the CPU.

Once installed, engine, runner and vocoder take every branch that they take on a GPU; the arithmetic within
captured functions stays that of a CPU, so codes and audio can be compared with those of a CPU.
What is launched on a stream runs at once on the host, but counts as done when the clock says so:
a replayed graph keeps its stream busy for a given time.
The host's clock moves where the host waits, and where a test says that the host has worked.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen import build
from gpu_worker.engines.qwen.engine import QwenEngine
from gpu_worker.engines.qwen.runner import CudaGraphModelRunner, rows_needed
from gpu_worker.engines.qwen.runtime import captured_buckets, cuda_streams
from gpu_worker.engines.qwen.runtime.captured_buckets import CapturedBuckets
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key, capture_graphs
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from tests.checkpoints import tiny
from tests.gpu_worker.engines.qwen.driving import parts

_run = CapturedBuckets.run

SHORTEST_SLEEP_S = 2e-4
"""The duration of the host's shortest sleep: the kernel wakes a thread late."""


class VirtualStream:
    """A stream: its work is done at `busy_until`, in seconds of the virtual clock."""

    def __init__(self, cuda: "VirtualCuda", priority: int = 0) -> None:
        self._cuda = cuda
        self.priority = priority
        self.busy_until = 0.0

    def launch(self, seconds: float) -> None:
        """Begin work behind all earlier work of this stream."""
        self.busy_until = max(self.busy_until, self._cuda.now) + seconds

    def wait_event(self, event: "VirtualEvent") -> None:
        self.busy_until = max(self.busy_until, event.time)

    def wait_stream(self, stream: "VirtualStream") -> None:
        self.busy_until = max(self.busy_until, stream.busy_until)

    def record_event(self) -> "VirtualEvent":
        event = VirtualEvent(self._cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.wait_until(self.busy_until)


class VirtualEvent:
    """A place in a stream."""

    def __init__(self, cuda: "VirtualCuda") -> None:
        self._cuda = cuda
        self.time = 0.0

    def record(self, stream: VirtualStream | None = None) -> None:
        self.time = (stream or self._cuda.current).busy_until

    def query(self) -> bool:
        return self._cuda.now >= self.time

    def synchronize(self) -> None:
        self._cuda.wait_until(self.time)


class VirtualGraph:
    """A CUDAGraph. `function` is None where replays take time but compute nothing."""

    def __init__(self, cuda: "VirtualCuda") -> None:
        self._cuda = cuda
        self._pool: object = None
        self.key: Key = ("", 0, 0)
        self.function: Callable[[], None] | None = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        del capture_error_mode
        self._pool = pool

    def capture_end(self) -> None:
        """Nothing is left to do: the function has run."""

    def pool(self) -> object:
        return self._pool

    def reset(self) -> None:
        """Nothing to free."""

    def replay(self) -> None:
        self._cuda.replays[self.key] += 1
        self._cuda.current.launch(self._cuda.device_time(self.key))
        if self.function is not None:
            self.function()


class VirtualCuda:
    """The device and its clock.

    `device_time` gives the seconds of a graph. With `computes`, functions are captured and replays compute;
    else nothing is captured, and replays only take their time.
    """

    def __init__(self, device_time: Callable[[Key], float], *, computes: bool) -> None:
        self.device_time = device_time
        self.computes = computes
        self.now = 0.0
        self.all_streams: list[VirtualStream] = []
        self.default = self.current = self.new_stream()
        self.calls: Counter[Key] = Counter()
        self.replays: Counter[Key] = Counter()
        self.misses: Counter[Key] = Counter()
        self.capture_priorities: set[tuple[str, int]] = set()
        self.streams = CudaStreams()
        self.arrivals: list[float] = []
        """The times at which commands for the engine will come."""

    def new_stream(self, priority: int = 0) -> VirtualStream:
        """In the place of torch.cuda.Stream."""
        self.all_streams.append(VirtualStream(self, priority))
        return self.all_streams[-1]

    def synchronize(self) -> None:
        """In the place of torch.cuda.synchronize."""
        self.wait_until(max(stream.busy_until for stream in self.all_streams))

    def wait_until(self, time: float) -> None:
        """Block the host."""
        self.now = max(self.now, time)

    def work(self, seconds: float) -> None:
        """Let the host compute."""
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        """In the place of time.sleep."""
        self.now += max(seconds, SHORTEST_SLEEP_S)

    @contextlib.contextmanager
    def stream(self, stream: VirtualStream | None) -> Iterator[None]:
        """In the place of torch.cuda.stream."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    def capture(self, functions: Mapping[Key, Callable[[], None]], **options: Any) -> Any:
        """In the place of `capture_graphs`: names the graphs, which CUDA does not."""
        captured, *rest = capture_graphs({key: self._called(key, functions[key]) for key in functions}, **options)
        for key, graph in captured.items():
            named: Any = graph
            self.capture_priorities.add((key[0], options["stream"].priority))
            named.key, named.function = key, functions[key] if self.computes else None
        return captured, *rest

    def run(self, buckets: CapturedBuckets, bucket: Key, eager: Callable[[], None]) -> bool:
        """In the place of `CapturedBuckets.run`: counts what was not captured."""

        def missed() -> None:
            self.misses[bucket] += 1
            eager()

        return _run(buckets, bucket, missed)

    def _called(self, key: Key, function: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            self.calls[key] += 1
            if self.computes:
                function()

        return call

    def engine(
        self, *, slots: int, dtype: str = "float32", directory: Path | None = None, **options: Any
    ) -> QwenEngine:
        """An engine of a small checkpoint of the tests on this device. The clock of its playback is the virtual one."""
        checkpoint = directory or tiny("custom_voice")
        made = parts("custom_voice", slots=slots, dtype=dtype, streams=self.streams, directory=checkpoint)
        return QwenEngine(
            made,
            pause_s=0.15,
            run_ahead=True,
            clock=lambda: self.now,
            sleep=lambda seconds: self.sleep(seconds),  # noqa: PLW0108 -- a test replaces it
            interrupted=lambda: bool(self.arrivals) and self.arrivals[0] <= self.now,
            **options,
        )


def install(
    monkeypatch: pytest.MonkeyPatch, device_time: Callable[[Key], float] = lambda _: 0.0, *, computes: bool = True
) -> VirtualCuda:
    """Put a new VirtualCuda in the place of torch's CUDA."""
    cuda = VirtualCuda(device_time, computes=computes)
    for name, value in {
        "Stream": cuda.new_stream,
        "Event": lambda: VirtualEvent(cuda),
        "CUDAGraph": lambda: VirtualGraph(cuda),
        "stream": cuda.stream,
        "current_stream": lambda: cuda.current,
        "default_stream": lambda: cuda.default,
        "synchronize": cuda.synchronize,
        "empty_cache": lambda: None,
        "graph_pool_handle": object,
        "memory_snapshot": lambda _pool: [],
        "mem_get_info": lambda: (0, 0),
        "memory_reserved": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # Integers tell the engine where copies run. Floats tell the arithmetic which kernels there are: those of a CPU.
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: not tensor.is_floating_point()), raising=False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("empty", "zeros", "tensor"):
        monkeypatch.setattr(torch, name, _unpinned(getattr(torch, name)))
    monkeypatch.setattr(captured_buckets, "capture_graphs", cuda.capture)
    if not computes:
        monkeypatch.setattr(captured_buckets, "warm_up", lambda *_: None)
    monkeypatch.setattr(CapturedBuckets, "run", lambda buckets, bucket, eager: cuda.run(buckets, bucket, eager))  # noqa: PLW0108 -- a method, so that it is bound
    monkeypatch.setattr(cuda_streams, "_allocate_workspace", lambda _: None)
    # The parts are built for a CPU, where the tensors are, but with CUDA's rows and runner.
    monkeypatch.setattr(build, "rows_needed", lambda slots, _: rows_needed(slots, torch.device("cuda")))
    monkeypatch.setattr(build, "CpuModelRunner", lambda model: CudaGraphModelRunner(model, cuda.streams))
    return cuda


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        del pin_memory
        return make(*args, **kwargs)

    return unpinned
