"""Functions captured for a few input sizes, their buckets: inputs are padded to the smallest bucket that holds them.

Owns the batch sizes, the captured functions' static inputs, and the order of capture.
It knows nothing of what the functions compute, nor which bucket a caller needs.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import msgspec
import torch
from torch import Tensor

from gpu_worker.engines.qwen.runtime.cuda_graphs import Graph, Key, capture_graphs

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that functions are captured for."""

Inputs = tuple[Tensor, ...]
"""The tensors that a captured function reads and writes at every replay."""

CaptureGraphs = Callable[..., tuple[Mapping[Key, Graph], int]]


class BucketedFunction(msgspec.Struct, frozen=True):
    """What to capture: `function`(batch size, length, inputs), for every batch size with every length.

    `batch_sizes` and `lengths` ascend; a function without a length has the one length 0.
    `new_inputs` allocates the static inputs of a batch size and length.
    """

    name: str
    function: Callable[[int, int, Inputs], None]
    batch_sizes: Sequence[int]
    lengths: Sequence[int] = (0,)
    new_inputs: Callable[[int, int], Inputs] = lambda _batch, _length: ()


class CapturedBuckets:
    """Captured functions and their static inputs, by bucket: (name, batch size, length)."""

    def __init__(self, capture_graphs: CaptureGraphs = capture_graphs) -> None:
        """`capture_graphs`: as in cuda_graphs.py."""
        self._capture_graphs = capture_graphs
        self._graphs: Mapping[Key, Graph] = {}
        self._inputs: dict[Key, Inputs] = {}
        self._pool_bytes = 0

    def capture(
        self, functions: Iterable[BucketedFunction], *, capturing: torch.cuda.Stream, warming: torch.cuda.Stream
    ) -> None:
        """Capture all functions in the order given, each one's largest bucket first. The streams: see capture_graphs.

        If this raises, no graph is kept.
        """
        calls: dict[Key, Callable[[], None]] = {}
        for one in functions:
            for batch in reversed(one.batch_sizes):
                for length in reversed(one.lengths):
                    inputs = self._inputs[one.name, batch, length] = one.new_inputs(batch, length)
                    calls[one.name, batch, length] = functools.partial(one.function, batch, length, inputs)
        self._graphs, self._pool_bytes = self._capture_graphs(calls, capturing=capturing, warming=warming)

    def inputs(self, bucket: Key) -> Inputs | None:
        """The static inputs of a bucket; None if it was not captured."""
        return self._inputs.get(bucket)

    def run(self, bucket: Key, eager: Callable[[], None]) -> None:
        """Replay a bucket's graph; call `eager` if it was not captured."""
        graph = self._graphs.get(bucket)
        if graph is None:
            eager()
        else:
            graph.replay()

    def release(self) -> None:
        """Free graphs and static inputs; `capture` makes them again."""
        self._graphs = {}
        self._inputs.clear()
        self._pool_bytes = 0

    def memory(self) -> dict[str, int]:
        """Device bytes by purpose."""
        inputs = sum(tensor.nbytes for tensors in self._inputs.values() for tensor in tensors)
        return {"graphs": self._pool_bytes, "workspace": inputs}


def smallest_bucket(number: int, sizes: Sequence[int]) -> int:
    """The smallest of ascending `sizes` that holds `number`.

    Raises:
        ValueError: `number` is more than the largest size.
    """
    for size in sizes:
        if number <= size:
            return size
    raise ValueError(f"{number} is more than the largest size, {sizes[-1]}")


def padded(numbers: Sequence[int], size: int, padding: int) -> list[int]:
    """`numbers`, and `padding` behind them up to `size` numbers."""
    return [*numbers, *[padding] * (size - len(numbers))]
