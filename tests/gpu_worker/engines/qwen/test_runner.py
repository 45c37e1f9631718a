from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen import runner as runner_module
from gpu_worker.engines.qwen.model import layers
from gpu_worker.engines.qwen.model.code_predictor import first_layer_inputs_shape
from gpu_worker.engines.qwen.runner import (
    BATCH_SIZES,
    PREFILL_LENGTHS,
    CpuModelRunner,
    CudaGraphModelRunner,
    PrefillInput,
    rows_needed,
    smallest_bucket,
)
from gpu_worker.engines.qwen.runtime.cuda_graphs import CudaGraphs, Key
from tests.gpu_worker.engines.qwen.parity import CASES, Ours, Request, generate


def test_sizes_are_rounded_up_to_what_was_captured() -> None:
    """The smallest that holds it; more than the largest is a mistake of the caller."""
    assert [smallest_bucket(number, BATCH_SIZES) for number in (1, 3, 17, 128)] == [1, 4, 24, 128]
    with pytest.raises(ValueError, match="129"):
        smallest_bucket(129, BATCH_SIZES)


def test_the_state_has_rows_for_padding_where_batches_are_fixed() -> None:
    """On CUDA the largest batch and a spare row; on CPU what is used."""
    assert rows_needed(6, torch.device("cpu")) == 6
    assert rows_needed(6, torch.device("cuda")) == 9


def test_prompts_of_one_length_bucket_are_read_together() -> None:
    """In groups of the captured sizes, float32 alone, spare rows pointing at the spare slot."""
    ours = Ours("custom_voice", None, slots=9, dtype=torch.bfloat16)
    runner = CudaGraphModelRunner(ours.model, slots=8, max_model_len=256)
    calls: list[tuple[int, int, list[int]]] = []
    prefill = ours.model.prefill

    def seen(embeds: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor, *, full_vocab: bool) -> None:
        calls.append((embeds.shape[0], embeds.shape[1], slots.tolist()))
        prefill(embeds, slots, lengths, full_vocab=full_vocab)

    ours.model.prefill = seen
    with torch.inference_mode():
        prompts = [ours.prompt(case) for case in CASES[:2]]
        runner.prefill([PrefillInput(slot, prompts[slot % 2], full_vocab=False) for slot in range(7)])
    short, long = sorted({smallest_bucket(len(prompt.embeds), (16, 32, 64, 128)) for prompt in prompts})
    even = smallest_bucket(len(prompts[0].embeds), (16, 32, 64, 128))
    odd = short if even == long else long
    assert calls == [(4, even, [0, 2, 4, 6]), (4, odd, [1, 3, 5, 8])]


def test_on_cpu_the_code_predictor_is_traced_before_anybody_speaks() -> None:
    """For every number of requests at once, so that none of their frames is late; a release does not undo it."""
    ours = Ours("custom_voice", None, slots=6)
    runner = CpuModelRunner(ours.model)
    predict, called = ours.model.code_predictor_step, []

    def seen(used: int) -> None:
        called.append(used)
        predict(used)

    ours.model.code_predictor_step = seen
    with torch.inference_mode():
        runner.prepare()
        assert set(called) == {1, 4, 6}
        held = runner.memory()
        assert held["graphs"] > 0
        del called[:]
        for _ in range(2):
            requests = [Request(prompt=ours.prompt(CASES[0]), join=place, frames=7) for place in range(6)]
            first, *others = generate(ours, requests, runner)
            assert all(torch.equal(codes, first) for codes in others)
            runner.release()
            runner.prepare()
            assert not called
            assert runner.memory() == held
        runner.close()
        assert runner.memory() == {"graphs": 0, "workspace": 0}


@pytest.fixture
def threads() -> Iterator[int]:
    """How many torch computes with during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("small", [True, False])
def test_a_small_code_predictor_is_computed_by_one_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, *, small: bool
) -> None:
    """One with products that are worth sharing by all; who comes after it has them all again, if it fails as well."""
    if not small:
        monkeypatch.setattr(layers, "PACK_ELEMENTS", 1)
    ours = Ours("custom_voice", None)
    runner = CpuModelRunner(ours.model)
    seen = []

    def fail(used: int) -> None:
        seen.append((used, torch.get_num_threads()))
        raise RuntimeError("out of luck")

    ours.model.code_predictor_step = fail
    with torch.inference_mode(), pytest.raises(RuntimeError, match="out of luck"):
        runner.decode_step([(0, 20)], full_vocab=False)
    assert seen == [(1, 1 if small else threads)]
    assert torch.get_num_threads() == threads


class Replayed(CudaGraphs):
    """Graphs without a GPU: keeps the functions that it is to record, and calls those where they would be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: dict[Key, Callable[[], None]] = {}
        self.replayed = 0

    def capture(self, functions: Mapping[Key, Callable[[], None]], *, recording: Any, warming: Any) -> None:
        """Run each, as a warm-up does."""
        assert (recording, warming) == ("frame_capture", "transfer")
        for function in functions.values():
            function()
        self.functions = dict(functions)
        self.bytes = 7

    def run(self, key: Key, function: Callable[[], None]) -> None:
        """What was kept under the key, if anything."""
        self.replayed += key in self.functions
        self.functions.get(key, function)()

    def clear(self) -> None:
        """Keep nothing."""
        super().clear()
        self.functions = {}


def test_what_was_captured_says_what_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured functions read their inputs where they were at the capture; released and prepared again as well."""
    monkeypatch.setattr(runner_module, "CudaGraphs", Replayed)
    streams: Any = SimpleNamespace(frame_capture="frame_capture", transfer="transfer")
    ours = Ours("custom_voice", None, slots=9)
    runner = CudaGraphModelRunner(ours.model, 8, 256, streams)
    shape = ours.config.talker_config
    predictor = shape.code_predictor_config
    cached = predictor.num_hidden_layers * 2 * 16 * predictor.num_key_value_heads * predictor.head_dim
    graphs: Any = runner._graphs
    assert runner.memory() == {"graphs": 0, "workspace": 0}
    with torch.inference_mode():
        requests = [Request(prompt=ours.prompt(case), join=place, frames=6) for place, case in enumerate(CASES[:3])]
        eager = CpuModelRunner(ours.model)
        wanted = generate(ours, requests, eager)
        eager.close()
        for _ in range(2):
            runner.prepare()
            memory = runner.memory()
            assert memory["graphs"] == 7
            # Inputs of a prompt of each captured length; and of one batch size, the code predictor's cache,
            # what a forward begins with, and cosines and sines of the first one's two tokens.
            inputs = sum(tokens * shape.hidden_size * 4 + 2 * 8 for tokens in PREFILL_LENGTHS if tokens < 256)
            scratch = cached + first_layer_inputs_shape(predictor)[1] + 2 * 2 * predictor.head_dim
            assert memory["workspace"] == inputs + 8 * 4 * scratch
            for codes, expected in zip(generate(ours, requests, runner), wanted, strict=True):
                assert torch.equal(codes, expected)
            runner.release()
            assert runner.memory() == {"graphs": 0, "workspace": 0}
    assert graphs.replayed > 2 * (3 + 2 * 6)
