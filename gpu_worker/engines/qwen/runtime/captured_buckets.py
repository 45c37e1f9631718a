"""Functions captured for a few input sizes ("buckets"). Inputs are padded to the smallest bucket that holds them.

Owns the batch sizes, the graphs and the static inputs that they read. It knows nothing of what the functions compute.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from gpu_worker.engines.qwen.runtime.cuda_graphs import GraphPool, Key, capture_graphs, warm_up

BATCH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes that decode steps are captured for."""

DECODE_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Batch sizes of the vocoder. Jobs are seldom in step, so a chunk is due for a few of them at a time."""


class CapturedBuckets:
    """Captured functions and their static inputs by bucket: (name, batch size, length), with length 0 for none."""

    def __init__(self) -> None:
        self._warmed_up = False
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._graph_bytes = 0
        self._pool: GraphPool | None = None
        self.inputs: dict[Key, tuple[Tensor, ...]] = {}
        """Tensors that a bucket's function reads and writes at every replay. Allocate them before `capture`."""

    def capture(
        self,
        functions: Mapping[Key, Callable[[], None]],
        *,
        capturing: torch.cuda.Stream,
        warming: torch.cuda.Stream,
        pool: GraphPool,
    ) -> None:
        """Capture functions on `capturing`, the largest bucket first (see `largest_first`).

        Before the first capture they run on `warming`. Later captures are of the same functions in the same thread,
        where libraries, kernels and workspaces are ready: that is half of the time of a restore.
        If this raises, no graph is kept.
        """
        if not self._warmed_up:
            warm_up(functions.values(), warming)
            self._warmed_up = True
        self._graphs, self._graph_bytes = capture_graphs(functions, stream=capturing, pool=pool)
        self._pool = pool

    def run(self, bucket: Key, eager: Callable[[], None]) -> bool:
        """Replay a bucket's graph (True); call `eager` if it was not captured (False)."""
        graph = self._graphs.get(bucket)
        if graph is None:
            eager()
            return False
        graph.replay()
        return True

    def release(self) -> None:
        """Free graphs and static inputs."""
        self._graphs = {}
        if self._pool is not None:
            self._pool.release()
            self._pool = None
        self._graph_bytes = 0
        self.inputs.clear()

    def memory(self) -> dict[str, int]:
        """Device bytes by purpose."""
        inputs = sum(tensor.nbytes for tensors in self.inputs.values() for tensor in tensors)
        return {"graphs": self._graph_bytes, "workspace": inputs}


def largest_first(batch_sizes: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every (batch size, length), in the order of capture: smaller ones then fit into the memory of larger ones."""
    return ((batch, length) for batch in reversed(batch_sizes) for length in reversed(lengths))


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
