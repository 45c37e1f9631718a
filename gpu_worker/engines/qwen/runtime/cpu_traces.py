"""Traces: functions captured on a CPU, and run again without Python between their operators.

They are for a CPU what CUDA graphs are for a GPU. A frame of the code predictor is a thousand operators on small
tensors, and a third of its time goes into calling them.
A trace calls the same operators, so no bit of a result changes.
Owns the traces. It knows nothing of what they compute.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import structlog
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu_worker.engines.faults import is_out_of_memory

log = structlog.get_logger(__name__)

NODE_BYTES: Final = 7 << 10
"""Host memory of a trace for each node of its graph. torch has no figure for it; this was measured over 3300 nodes."""

_SHAPE: Final = Tensor.shape.__get__  # type: ignore[attr-defined]  # mypy does not know that it is a descriptor


Function = Callable[..., Any]
"""Takes tensors, and returns a tuple of tensors, or anything else if its result is not needed."""

Key = tuple[int, str]
"""The batch size and the name of a function."""


class Run(Protocol):
    """Runs a function; CpuTraces runs a trace of it."""

    def __call__(
        self, name: str, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """The result of `function(*arguments)`. `varied`: see CpuTraces.run."""


def run_untraced(
    name: str, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """As Run."""
    del name, varied
    return _tuple(function(*arguments))


class CpuTraces:
    """Traced functions by key.

    Such a function calls the same operators on tensors of the same shapes whatever their values,
    and may run several times instead of once.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        """`tensors`: all that outlive a function's call, and all views of them that the function does not make itself.

        A trace may leave out writes into any other tensor, and a packed weight that is missing here cannot be traced.
        """
        self._tensors = tensors
        self._traces: dict[Key, Function] = {}
        self.untraced_runs = 0
        """Calls of `run` that took a function as it is, to trace it or because torch cannot."""
        self.bytes = 0
        """An estimate of the traces' host memory."""

    def run(
        self, key: Key, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """The result of `function(*arguments)`, by the trace of `key`. If there is none, the function is traced first.

        `varied`: what else the function reads and writes that is not the same in all calls, always in one order.
        A size of theirs may differ too, if only operators see it. Other numbers are those of the first call.
        Tracing takes 0.1 s, and less for a function that is one forward of the code predictor.
        """
        traced = self._traces.get(key)
        if traced is None:
            function(*arguments)  # untraced first: it allocates the scratch memory that the trace will refer to
            traced = self._traces[key] = self._trace(function, arguments, varied)
            self.untraced_runs += 1
        elif isinstance(traced, _Untraced):
            self.untraced_runs += 1
        with _without_fusion():
            return _tuple(traced(*arguments, *varied))

    def clear(self) -> None:
        """Free all traces, and the tensors that only they hold."""
        self._traces.clear()
        self.bytes = 0

    def _trace(self, function: Function, arguments: Sequence[Tensor], varied: Sequence[Tensor]) -> Function:
        """The trace of `function`, called with `arguments` and `varied`; without a trace if torch cannot make one."""
        try:
            # torch.compile would need a C++ compiler on every machine, and it fuses operators:
            # a row's bits would depend on whether its batch size is compiled.
            with warnings.catch_warnings(), _without_fusion(), _ConstantSizes():
                warnings.simplefilter("ignore")  # torch warns that sizes become constants: that is intended
                given = {id(tensor): tensor for tensor in (*arguments, *varied)}
                fixed = {id(tensor): tensor for tensor in self._tensors() if id(tensor) not in given}
                tensors = [*given.values(), *fixed.values()]
                graph = _graph(function, len(arguments), tensors)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            log.warning("function_not_traced", effect="every frame takes longer", exc_info=error)
            return _Untraced(function, len(arguments))
        self.bytes += NODE_BYTES * sum(1 for _ in graph.nodes())
        return _Traced(graph, len(given), tensors)


class _Traced:
    """A graph, called with the first of the tensors that it was traced with. It keeps the others."""

    def __init__(self, graph: torch.Graph, given: int, tensors: list[Tensor]) -> None:
        """`graph`: a function of all `tensors`. `given`: how many of them each call brings."""
        used = [bool(value.uses()) for value in graph.inputs()]
        for place in reversed(range(len(used))):
            if not used[place]:
                graph.eraseInput(place)  # a call takes 50 ns for each tensor, and there are some hundreds
        self._given = [place for place in range(given) if used[place]]
        self._fixed = [tensors[place] for place in range(given, len(tensors)) if used[place]]
        # torch.jit.trace would keep its function for the life of the process; this one is freed with `clear`.
        self._function = torch._C._create_function_from_graph("traced", graph)  # noqa: SLF001 -- no public way

    def __call__(self, *given: Tensor) -> Any:
        return self._function(*[given[place] for place in self._given], *self._fixed)


class _Untraced:
    """A function as it is, called as its trace would be."""

    def __init__(self, function: Function, arguments: int) -> None:
        self._function = function
        self._arguments = arguments

    def __call__(self, *given: Tensor) -> Any:
        return self._function(*given[: self._arguments])


def _graph(function: Function, arguments: int, tensors: list[Tensor]) -> torch.Graph:
    """The operators of `function`, as a graph whose arguments are `tensors`, those of the function first."""

    def traced(*given: Tensor) -> tuple[Tensor, ...]:
        return _tuple(function(*given[:arguments])) or (torch.empty(0),)  # a trace must return a tensor

    # The tensors are arguments: torch would take writes into any other tensor for dead code.
    graph, _ = torch._C._create_graph_by_tracing(traced, tuple(tensors), lambda _: "", True, False)  # noqa: SLF001 -- as torch.jit.trace does
    # One node for each number instead of one for each operator that takes it: half the memory.
    torch._C._jit_pass_constant_pooling(graph)  # type: ignore[attr-defined]  # noqa: SLF001 -- as above
    return graph


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else ()


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
