"""Traces: functions recorded on a CPU, and run again without Python between their operators.

For a CPU what graphs.py is for CUDA: a frame of the code predictor is a thousand operators on small tensors,
and a third of its time goes into calling them. They stay the same operators, so not a bit of a result changes.
This owns the recordings, and knows nothing of what they compute.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu_worker.engines.faults import is_out_of_memory

_log = logging.getLogger(__name__)

NODE_BYTES: Final = 6 << 10
"""Host memory of a recording, for each node of its graph: torch does not tell, this was seen over 4000 nodes."""

_SHAPE: Final = Tensor.shape.__get__  # type: ignore[attr-defined]  # for the type checker it is no property


class CpuTraces:
    """Recorded functions by key.

    Such a function takes and returns nothing, calls the same operators on the same tensors whatever is in them,
    and may be run several times where once is asked.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """`tensors`: every one that outlives a function, and every view of one that is not made by the function.

        What is written into others may be left out of a recording, and packed weights cannot be recorded at all.
        """
        self._tensors = tensors
        self._functions: dict[int, Callable[[], Any]] = {}
        self.bytes = 0
        """Host memory of the recordings, roughly."""

    def capture(self, key: int, function: Callable[[], None]) -> None:
        """Run the function and record it, unless that was done: 0.1 s, and at published sizes half a second."""
        if key not in self._functions:
            function()  # by itself first: what it makes once and keeps is then there to be recorded
            self._functions[key] = self._record(function)
            self.run(key, function)  # torch prepares a recording, and takes half of its memory, when it first runs

    def run(self, key: int, function: Callable[[], None]) -> None:
        """Run what was recorded under `key`; where nothing was, `capture` it, which runs it, too."""
        known = self._functions.get(key)
        if known is None:
            self.capture(key, function)
        else:
            with _as_recorded():
                known()

    def clear(self) -> None:
        """Forget all recordings, and with them the tensors that they hold."""
        self._functions.clear()
        self.bytes = 0

    def _record(self, function: Callable[[], None]) -> Callable[[], Any]:
        """The recording; where torch can make none, the function."""
        try:
            # torch would rather compile today. That takes a C++ compiler on every machine, and fuses operators:
            # a row would no longer say the same in a batch that is compiled and in one that is not.
            with warnings.catch_warnings(), _as_recorded(), _Sizes():
                warnings.simplefilter("ignore")  # sizes become constants, it warns: they are
                tensors = list({id(tensor): tensor for tensor in self._tensors()}.values())
                graph = _trace(function, tensors)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            _log.warning("torch can trace nothing here: every frame takes longer", exc_info=error)
            return function
        self.bytes += NODE_BYTES * sum(1 for _ in graph.nodes())
        # What torch.jit.trace makes of a graph is kept for as long as the process lives; this goes with its function.
        return functools.partial(torch._C._create_function_from_graph("traced", graph), *tensors)  # noqa: SLF001 -- as said


def _trace(function: Callable[[], None], tensors: list[Tensor]) -> torch.Graph:
    """The operators of `function` as a function of `tensors`."""

    def traced(*_: Tensor) -> Tensor:
        function()
        return torch.empty(0)  # something must come back

    # The tensors are its arguments, or what it writes into them would count as dead.
    graph, _ = torch._C._create_graph_by_tracing(traced, tuple(tensors), lambda _: "", True, False)  # noqa: SLF001 -- torch.jit.trace begins so, too
    # Each number is there once instead of at every operator that takes it: half the memory.
    torch._C._jit_pass_constant_pooling(graph)  # type: ignore[attr-defined]  # noqa: SLF001 -- as above
    return graph


class _Sizes(TorchFunctionMode):
    """Sizes are plain numbers: while it records, torch gives tensors instead, and records what is computed with them.

    That would be 60 % more nodes, and up to a tenth more time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        return torch.Size(int(size) for size in result) if func == _SHAPE else result


def _as_recorded() -> Any:
    """Keeps torch from looking for ways to fuse operators: it takes 0.3 s, and finds none."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
