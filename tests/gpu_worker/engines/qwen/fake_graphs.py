"""CUDA graphs without a GPU."""

from collections.abc import Callable, Mapping
from typing import Any

from gpu_worker.engines.qwen.runtime.cuda_graphs import CudaGraphs, Key


class FakeGraphs(CudaGraphs):
    """Keeps the functions to capture; a replay calls the function kept."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: dict[Key, Callable[[], None]] = {}
        self.streams: dict[str, Any] = {}
        self.replays = 0

    def capture(self, functions: Mapping[Key, Callable[[], None]], *, capturing: Any, warming: Any) -> None:
        """Call each function once, as the warm-up does."""
        for function in functions.values():
            function()
        self.captured = dict(functions)
        self.streams = {"capturing": capturing, "warming": warming}
        self.bytes = 7

    def run(self, key: Key, function: Callable[[], None]) -> None:
        """Call the function kept under `key`, or else `function`."""
        self.replays += key in self.captured
        self.captured.get(key, function)()

    def clear(self) -> None:
        """Keep nothing."""
        super().clear()
        self.captured = {}
