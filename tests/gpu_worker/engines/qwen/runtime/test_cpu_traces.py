import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.engines.faults import is_out_of_memory
from gpu_worker.engines.qwen.model.attention import Backend
from gpu_worker.engines.qwen.model.layers import PACK_ELEMENTS, Linear
from gpu_worker.engines.qwen.runtime import cpu_traces as traces_module
from gpu_worker.engines.qwen.runtime.cpu_traces import CpuTraces
from gpu_worker.residency.host_ram import read_ram, trim_host
from tests.checkpoints import Size
from tests.gpu_worker.engines.qwen.parity import Ours


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def traces(*tensors: Tensor) -> CpuTraces:
    """Of functions that have these."""
    return CpuTraces(lambda: tensors)


def counted(function: Callable[[], None]) -> tuple[Callable[[], None], list[None]]:
    """A function, and an item for each of its runs in Python."""
    runs: list[None] = []

    def count() -> None:
        runs.append(None)
        function()

    return count, runs


@pytest.mark.parametrize("size", [None, "1b7"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_traced_frame_is_the_same_to_the_last_bit(size: Size, backend: Backend, dtype: torch.dtype) -> None:
    """All that the code predictor writes, for 1 to 8 slots, again and again with other contents; Python runs once."""
    model = Ours("custom_voice", size, backend=backend, dtype=dtype).model
    state = model.state
    recorded = CpuTraces(lambda: (*state.tensors(), *model.code_predictor.tensors(), *model.code_predictor.scratch()))
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

    for used in (1, 2, 3, 5, 8):
        predict, runs = counted(functools.partial(model.code_predictor_step, used))
        recorded.run(used, predict)
        assert len(runs) == 2  # as it is, and to be recorded
        for number in range(5):
            wanted = outcome(predict, number)
            assert (state.ring_buffer[:used] != 0).any()
            del runs[:]
            got = outcome(functools.partial(recorded.run, used, predict), number)
            assert not runs
            assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_products_with_packed_weights_are_traced() -> None:
    """Those of published sizes are; the small checkpoints have none."""
    rows, columns = 4, 1 << 10
    linear = Linear(torch.randn(PACK_ELEMENTS // columns, columns))
    assert linear.packed
    x, y = torch.randn(rows, columns), torch.empty(rows, PACK_ELEMENTS // columns)
    multiply, runs = counted(lambda: y.copy_(linear(x)))  # type: ignore[arg-type]
    recorded = traces(*linear.tensors(), x, y)
    recorded.run(1, multiply)
    x.normal_()
    wanted = linear(x)
    del runs[:]
    recorded.run(1, multiply)
    assert not runs
    assert torch.equal(y, wanted)


def test_sizes_are_numbers_in_a_recording() -> None:
    """Whoever asks a tensor for them records no more than who knows them."""
    x, out = torch.ones(4, 6), torch.zeros(24)

    def asks() -> None:
        rows, columns = x.shape
        out.copy_(x.view(rows * columns))

    recordings = [traces(x, out), traces(x, out)]
    for recorded, function in zip(recordings, (asks, lambda: out.copy_(x.view(24))), strict=True):
        recorded.run(1, function)  # type: ignore[arg-type]
    assert recordings[0].bytes == recordings[1].bytes > 0


def test_what_cannot_be_traced_runs_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Slower, and the log says so, once a function."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(traces_module, "_trace", refuse)
    total = torch.zeros(1)
    increase, runs = counted(lambda: total.add_(1))  # type: ignore[arg-type]
    recorded = traces(total)
    with caplog.at_level(logging.WARNING):
        recorded.run(1, increase)
        del runs[:]
        total.zero_()
        for _ in range(2):
            recorded.run(1, increase)
    assert len(runs) == 2
    assert total.item() == 2
    assert recorded.bytes == 0
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_memory_that_runs_out_is_known_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is recorded, when the function is recorded the next time; and in a recording."""
    repeats, out = torch.ones(1, dtype=torch.int64), torch.zeros(1)
    function, runs = counted(lambda: out.copy_(torch.ones(1).repeat_interleave(repeats).sum()))  # type: ignore[arg-type]
    recorded = traces(repeats, out)

    def exhausted(*_: object, **__: object) -> NoReturn:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(traces_module, "_trace", exhausted)
        with pytest.raises(MemoryError):
            recorded.run(1, function)
    recorded.run(1, function)
    del runs[:]
    recorded.run(1, function)
    assert not runs
    repeats.fill_(1 << 50)
    with pytest.raises(RuntimeError) as caught:
        recorded.run(1, function)
    assert is_out_of_memory(caught.value)
    repeats.fill_(3)
    recorded.run(1, function)
    assert out.item() == 3


def test_forgotten_recordings_hold_no_memory() -> None:
    """Weights are theirs, too, until they are forgotten."""
    array = np.ones(4, dtype=np.float32)
    held = weakref.ref(array)
    tensors = [torch.from_numpy(array), torch.zeros(4)]
    del array
    recorded = CpuTraces(lambda: tensors)
    recorded.run(1, lambda: tensors[1].copy_(tensors[0] * 2))  # type: ignore[arg-type]
    tensors.clear()
    assert held() is not None
    recorded.clear()
    assert held() is None


def test_what_is_forgotten_leaves_nothing_in_the_process() -> None:
    """Models come and go for as long as it lives; torch.jit.trace would keep some MiB of each."""
    out = torch.zeros(4)

    def much() -> None:
        x = out
        for _ in range(300):
            x = x + 1
        out.copy_(x)

    def cycle(times: int) -> int:
        for _ in range(times):
            recorded = traces(out)
            recorded.run(1, much)
            recorded.clear()
        trim_host(collect=True)
        return read_ram().ours_bytes

    before = cycle(10)
    assert cycle(20) - before < 4 << 20
