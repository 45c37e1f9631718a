"""CUDA graphs without a GPU."""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from gpu_worker.engines.qwen.runtime.cuda_graphs import Key


class FakeGraph(msgspec.Struct):
    """A graph whose replay calls the function."""

    function: Callable[[], None]
    replays: int = 0

    def replay(self) -> None:
        """Call the function."""
        self.replays += 1
        self.function()


class FakeCapture:
    """In place of `capture_graphs`: keeps the functions."""

    def __init__(self) -> None:
        self.graphs: dict[Key, FakeGraph] = {}
        self.streams: dict[str, Any] = {}

    def __call__(self, functions: Mapping[Key, Callable[[], None]], **streams: Any) -> tuple[dict[Key, FakeGraph], int]:
        """Call each function once, as the warm-up does. The pool has 7 bytes."""
        for function in functions.values():
            function()
        self.graphs = {key: FakeGraph(function) for key, function in functions.items()}
        self.streams = streams
        return self.graphs, 7
