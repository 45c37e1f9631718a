import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from gpu_worker.engines.faults import is_out_of_memory
from gpu_worker.engines.qwen.model.attention import Backend
from gpu_worker.engines.qwen.model.layers import Linear
from gpu_worker.engines.qwen.runtime.cpu_traces import CpuTraces, Function
from gpu_worker.engines.qwen.runtime.products import PACK_ELEMENTS
from gpu_worker.residency.host_ram import read_ram, trim_host
from tests.checkpoints import Size
from tests.gpu_worker.engines.qwen.parity import Ours

KEY = (1, "function")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def traces(*tensors: Tensor) -> CpuTraces:
    """Traces of functions that read and write `tensors`."""
    return CpuTraces(lambda: tensors)


def counted(function: Function) -> tuple[Function, list[None]]:
    """`function`, and a list that gets an item at each of its runs in Python."""
    runs: list[None] = []

    def count(*arguments: Tensor) -> Any:
        runs.append(None)
        return function(*arguments)

    return count, runs


@pytest.mark.parametrize(
    ("size", "backend", "dtype"),
    [
        (None, "eager", torch.bfloat16),
        ("1b7", "sdpa", torch.float32),
        pytest.param(None, "eager", torch.float32, marks=pytest.mark.soak),
        pytest.param(None, "sdpa", torch.bfloat16, marks=pytest.mark.soak),
        pytest.param("1b7", "eager", torch.bfloat16, marks=pytest.mark.soak),
    ],
)
def test_a_traced_frame_is_the_same_to_the_last_bit(size: Size | None, backend: Backend, dtype: torch.dtype) -> None:
    """All that the code predictor's half of a frame writes is, for 1 to 8 slots and with other values each time."""
    model = Ours("custom_voice", size, backend=backend, dtype=dtype).model
    state, predictor = model.state, model.code_predictor
    embedded = (model.codec_table, model.table_offsets)
    traced = CpuTraces(lambda: (*embedded, *state.tensors(), *predictor.tensors(), *predictor.scratch()))
    runs: list[str] = []
    random = torch.Generator().manual_seed(1)

    def outcome(run: Callable[[], None], number: int) -> list[Tensor]:
        random.manual_seed(number)
        state.hidden.normal_(generator=random)
        state.trailing.normal_(generator=random)
        state.next_codebook0.random_(0, state.eos_code, generator=random)
        state.uniform.uniform_(generator=random)
        state.frame.random_(0, state.uniform.shape[1], generator=random)
        state.ring_buffer.zero_()
        state.talker_input.zero_()
        run()
        return [tensor.clone() for tensor in state.tensors()]

    for batch in (1, 3, 8):
        step = functools.partial(model.code_predictor_step, batch)

        def run(name: str, function: Function, *arguments: Tensor, varied: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
            function, called = counted(function)
            result = traced.run((batch, name), function, *arguments, varied=varied)  # noqa: B023 -- called in this round
            runs.extend(name for _ in called)
            return result

        step(run)
        assert sorted(runs) == sorted(2 * ["inputs", "first", "next", "last", "embed"])  # untraced, and to be traced
        for number in range(3):
            wanted = outcome(step, number)
            assert (state.ring_buffer[:batch] != 0).any()
            del runs[:]
            got = outcome(functools.partial(step, run), number)
            assert not runs
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_products_with_packed_weights_are_traced() -> None:
    """The small checkpoints have none, so this one has the size of published ones."""
    rows, columns = 4, 1 << 10
    linear = Linear(torch.randn(PACK_ELEMENTS // columns, columns))
    assert linear.packed
    x, y = torch.randn(rows, columns), torch.empty(rows, PACK_ELEMENTS // columns)
    multiply, runs = counted(lambda: y.copy_(linear(x)))  # type: ignore[arg-type]
    traced = traces(*linear.tensors(), x, y)
    traced.run(KEY, multiply)
    x.normal_()
    wanted = linear(x)
    del runs[:]
    traced.run(KEY, multiply)
    assert not runs
    assert torch.equal(y, wanted)


def test_a_trace_serves_calls_with_other_tensors() -> None:
    """Arguments, other tensors that a call uses, some of another length, and tensors that no call uses."""
    kept, unused = torch.full((2,), 10.0), torch.ones(2)
    read, written = [torch.ones(2, n) for n in (1, 2, 3)], [torch.zeros(2) for _ in range(3)]
    traced = traces(kept, unused, *read, *written)

    def function(number: int, x: Tensor) -> tuple[Tensor, Tensor]:
        written[number].copy_(read[number].sum(1) * x)
        return x + kept, x - kept

    for number in range(3):
        x = torch.full((2,), number + 1.0)
        step, runs = counted(functools.partial(function, number))
        plus, minus = traced.run(KEY, step, x, varied=[read[number], unused, written[number]])
        assert len(runs) == (0 if number else 2)
        assert (plus.tolist(), minus.tolist()) == ([number + 11] * 2, [number - 9] * 2)
        assert written[number].tolist() == [(number + 1) ** 2] * 2


def test_sizes_are_constants_in_a_trace() -> None:
    """A function that reads a tensor's shape has no more nodes than one that knows it."""
    x, out = torch.ones(4, 6), torch.zeros(24)

    def reads_shape() -> None:
        rows, columns = x.shape
        out.copy_(x.view(rows * columns))

    both = [traces(x, out), traces(x, out)]
    for traced, function in zip(both, (reads_shape, lambda: out.copy_(x.view(24))), strict=True):
        traced.run(KEY, function)  # type: ignore[arg-type]
    assert both[0].bytes == both[1].bytes > 0


class FailsOnceTraced:
    """A function that raises `error` at its second call, which is the one that is traced."""

    def __init__(self, function: Callable[[], object], error: Exception) -> None:
        self.calls = 0
        self._function = function
        self._error = error

    def __call__(self) -> None:
        """Call the function, or raise."""
        self.calls += 1
        if self.calls == 2:
            raise self._error
        self._function()


def test_a_function_that_cannot_be_traced_runs_as_it_is() -> None:
    """It takes longer, and the log has one event for it."""
    total = torch.zeros(1)
    increase = FailsOnceTraced(lambda: total.add_(1), RuntimeError("not on this machine"))
    traced = traces(total)
    with capture_logs() as events:
        traced.run(KEY, increase)
        total.zero_()
        increase.calls = 2
        for _ in range(2):
            traced.run(KEY, increase)
    assert increase.calls == 4
    assert total.item() == 2
    assert traced.bytes == 0
    assert [event["event"] for event in events] == ["function_not_traced"]


def test_an_error_for_lack_of_memory_is_recognised() -> None:
    """If it is raised while a function is traced, the next run traces it; if a trace raises it, the trace stays."""
    repeats, out = torch.ones(1, dtype=torch.int64), torch.zeros(1)

    def repeat() -> None:
        out.copy_(torch.ones(1).repeat_interleave(repeats).sum())

    function = FailsOnceTraced(repeat, MemoryError())
    traced = traces(repeats, out)
    with pytest.raises(MemoryError):
        traced.run(KEY, function)
    traced.run(KEY, function)
    calls = function.calls
    repeats.fill_(1 << 50)
    with pytest.raises(RuntimeError) as caught:
        traced.run(KEY, function)
    assert is_out_of_memory(caught.value)
    repeats.fill_(3)
    traced.run(KEY, function)
    assert out.item() == 3
    assert function.calls == calls


def test_cleared_traces_hold_no_memory() -> None:
    """Until then, they also hold the weights."""
    array = np.ones(4, dtype=np.float32)
    held = weakref.ref(array)
    tensors = [torch.from_numpy(array), torch.zeros(4)]
    del array
    traced = CpuTraces(lambda: tensors)
    traced.run(KEY, lambda: tensors[1].copy_(tensors[0] * 2))  # type: ignore[arg-type]
    tensors.clear()
    assert held() is not None
    traced.clear()
    assert held() is None


def test_cleared_traces_leave_nothing_in_the_process() -> None:
    """Models come and go for as long as the process lives. torch.jit.trace would keep some MiB of each."""
    out = torch.zeros(4)

    def much() -> None:
        x = out
        for _ in range(300):
            x = x + 1
        out.copy_(x)

    def cycle(times: int) -> int:
        for _ in range(times):
            traced = traces(out)
            traced.run(KEY, much)
            traced.clear()
        trim_host(collect=True)
        return read_ram().ours_bytes

    before = cycle(3)
    assert cycle(6) - before < 4 << 20
