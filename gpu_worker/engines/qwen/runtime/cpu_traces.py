"""Traces: functions captured on a CPU, and run again without Python between their operators.

They are for a CPU what CUDA graphs are for a GPU. A frame of the code predictor is a thousand operators on small
tensors, and a third of its time goes into calling them.
A trace calls the same operators, so no bit of a result changes.
Owns the traces. It knows nothing of what they compute.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu_worker.engines.faults import is_out_of_memory

log = structlog.get_logger(__name__)

NODE_BYTES: Final = 6 << 10
"""Host memory of a trace for each node of its graph. torch has no figure for it; this was measured over 4000 nodes."""

_SHAPE: Final = Tensor.shape.__get__  # type: ignore[attr-defined]  # mypy does not know that it is a descriptor


class CpuTraces:
    """Traced functions by key.

    Such a function takes and returns nothing, calls the same operators on the same tensors whatever their values,
    and may run several times instead of once.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """`tensors`: all that outlive a function's call, and all views of them that the function does not make itself.

        A trace may leave out writes into any other tensor, and a packed weight that is missing here cannot be traced.
        """
        self._tensors = tensors
        self._functions: dict[int, Callable[[], Any]] = {}
        self._untraced: set[int] = set()
        self.bytes = 0
        """An estimate of the traces' host memory."""

    def capture(self, key: int, function: Callable[[], None]) -> None:
        """Run the function and trace it, unless `key` has a trace: 0.1 s, half a second for published sizes."""
        if key not in self._functions:
            function()  # untraced first: it allocates the scratch memory that the trace will refer to
            self._functions[key] = self._trace(function)
            if self._functions[key] is function:
                self._untraced.add(key)
            self.run(key, function)  # torch prepares a trace, and takes half of its memory, when it first runs

    def run(self, key: int, function: Callable[[], None]) -> bool:
        """Run the trace of `key` (True); if there is none, `capture` the function, which runs it, too (False)."""
        traced = self._functions.get(key)
        if traced is None:
            self.capture(key, function)
            return False
        with _without_fusion():
            traced()
        return key not in self._untraced

    def clear(self) -> None:
        """Free all traces, and the tensors that only they hold."""
        self._functions.clear()
        self._untraced.clear()
        self.bytes = 0

    def _trace(self, function: Callable[[], None]) -> Callable[[], Any]:
        """The trace of `function`; the function itself if torch cannot trace it."""
        try:
            # torch.compile would need a C++ compiler on every machine, and it fuses operators:
            # a row's bits would depend on whether its batch size is compiled.
            with warnings.catch_warnings(), _without_fusion(), _ConstantSizes():
                warnings.simplefilter("ignore")  # torch warns that sizes become constants: that is intended
                tensors = list({id(tensor): tensor for tensor in self._tensors()}.values())
                graph = _graph(function, tensors)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.warning("function_not_traced", effect="every frame takes longer", exc_info=error)
            return function
        self.bytes += NODE_BYTES * sum(1 for _ in graph.nodes())
        # torch.jit.trace would keep its function for the life of the process; this one is freed with `clear`.
        return functools.partial(torch._C._create_function_from_graph("traced", graph), *tensors)  # noqa: SLF001 -- no public way


def _graph(function: Callable[[], None], tensors: list[Tensor]) -> torch.Graph:
    """The operators of `function`, as a graph whose arguments are `tensors`."""

    def traced(*_: Tensor) -> Tensor:
        function()
        return torch.empty(0)  # a trace must return a tensor

    # The tensors are arguments: torch would take writes into any other tensor for dead code.
    graph, _ = torch._C._create_graph_by_tracing(traced, tuple(tensors), lambda _: "", True, False)  # noqa: SLF001 -- as torch.jit.trace does
    # One node for each number instead of one for each operator that takes it: half the memory.
    torch._C._jit_pass_constant_pooling(graph)  # type: ignore[attr-defined]  # noqa: SLF001 -- as above
    return graph


class _ConstantSizes(TorchFunctionMode):
    """Makes `Tensor.shape` return plain numbers during a trace.

    torch would return tensors instead, and trace what is computed with them: 60 % more nodes, up to a tenth more time.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        return torch.Size(int(size) for size in result) if func == _SHAPE else result


def _without_fusion() -> Any:
    """Keeps torch from searching for operators to fuse: the search takes 0.3 s and finds none."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
