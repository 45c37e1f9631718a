"""CUDA graphs without a GPU."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.qwen.runtime import captured_buckets
from gpu_worker.engines.qwen.runtime.cuda_graphs import Key


class FakeGraph(msgspec.Struct):
    """A graph whose replay calls the function."""

    function: Callable[[], None]
    replays: int = 0

    def replay(self) -> None:
        """Call the function."""
        self.replays += 1
        self.function()


class FakePool:
    """A GraphPool that only counts."""

    def __init__(self) -> None:
        self.users = 0

    def acquire(self) -> None:
        self.users += 1

    def release(self) -> None:
        self.users -= 1


class FakeCapture:
    """In place of `warm_up` and `capture_graphs`: keeps the functions, whose graphs take 7 bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: dict[Key, FakeGraph] = {}
        self.streams: dict[str, Any] = {}
        self.warming: list[Any] = []
        monkeypatch.setattr(captured_buckets, "warm_up", self._warm_up)
        monkeypatch.setattr(captured_buckets, "capture_graphs", self._capture)

    def _warm_up(self, functions: Iterable[Callable[[], None]], stream: Any) -> None:
        self.warming.append(stream)
        for function in functions:
            function()

    def _capture(
        self, functions: Mapping[Key, Callable[[], None]], *, pool: FakePool, **streams: Any
    ) -> tuple[dict[Key, FakeGraph], int]:
        self.graphs = {key: FakeGraph(function) for key, function in functions.items()}
        self.streams = streams
        pool.acquire()
        return self.graphs, 7
