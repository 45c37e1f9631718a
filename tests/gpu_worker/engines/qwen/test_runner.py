from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_worker.engines.qwen.runner import (
    PREFILL_LENGTHS,
    CpuModelRunner,
    CudaGraphModelRunner,
    PrefillInput,
    rows_needed,
)
from gpu_worker.engines.qwen.runtime import products
from gpu_worker.engines.qwen.runtime.captured_buckets import smallest_bucket
from gpu_worker.engines.qwen.runtime.cpu_traces import CpuTraces, Key
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from tests.gpu_worker.engines.qwen.fake_graphs import FakeCapture, FakePool
from tests.gpu_worker.engines.qwen.parity import CASES, Ours, Request, generate


def test_the_state_has_rows_for_padding_where_batches_are_fixed() -> None:
    """On CUDA the rows of a captured batch size and one for padding; on CPU one row a slot."""
    assert rows_needed(6, torch.device("cpu")) == 6
    assert rows_needed(6, torch.device("cuda")) == 9


def test_prompts_of_one_length_bucket_are_read_together() -> None:
    """bfloat16 prompts are read in groups of the captured sizes; rows of padding write to the padding slot."""
    ours = Ours("custom_voice", None, slots=9, dtype=torch.bfloat16)
    runner = CudaGraphModelRunner(ours.model, CudaStreams())
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


def test_on_cpu_the_code_predictor_is_traced_before_the_first_frame() -> None:
    """It is traced for every number of requests at once, so no frame is late; `release` keeps the traces."""
    ours = Ours("custom_voice", None, slots=6)
    runner = CpuModelRunner(ours.model)
    step, called = ours.model.code_predictor_step, []

    def seen(batch: int) -> None:
        called.append(batch)
        step(batch)

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


def test_the_forwards_of_a_large_code_predictor_share_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of the memory at most, and give the same codes. So do the layers of a large talker.

    A load runs each of the functions once.
    """
    small = Ours("custom_voice", None, slots=1)
    monkeypatch.setattr(products, "PACK_ELEMENTS", 1)
    large = Ours("custom_voice", None, slots=1)
    run, names = CpuTraces.run, []

    def seen(traces: CpuTraces, key: Key, *arguments: Any, **varied: Any) -> tuple[torch.Tensor, ...]:
        names.append(key[1])
        return run(traces, key, *arguments, **varied)

    monkeypatch.setattr(CpuTraces, "run", seen)
    graphs, codes = [], []
    for ours in (small, large):
        runner = CpuModelRunner(ours.model)
        with torch.inference_mode():
            del names[:]
            runner.prepare()
            assert len(set(names)) == len(names)
            graphs.append(runner.memory()["graphs"])
            codes += generate(ours, [Request(prompt=ours.prompt(CASES[0]), join=0, frames=7)], runner)
            del names[:]
            assert runner.decode_step([(0, 20)], full_vocab=False)
        layers = len(ours.model.talker.stack.layers) if ours is large else 1
        assert names.count("between_layers") == layers - 1
        runner.close()
    assert 0 < graphs[1] < graphs[0] / 3
    assert torch.equal(*codes)


@pytest.fixture
def threads() -> Iterator[int]:
    """The number of torch's threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


@pytest.mark.parametrize("small", [True, False])
def test_a_small_code_predictor_is_computed_by_one_thread(
    monkeypatch: pytest.MonkeyPatch, threads: int, *, small: bool
) -> None:
    """A large one is computed by all threads. Afterwards torch has all threads again, even if the step failed."""
    if not small:
        monkeypatch.setattr(products, "PACK_ELEMENTS", 1)
    ours = Ours("custom_voice", None)
    runner = CpuModelRunner(ours.model)
    seen = []

    def fail(batch: int, *_: Any) -> None:
        seen.append((batch, torch.get_num_threads()))
        raise RuntimeError("made up")

    ours.model.code_predictor_step = fail
    with torch.inference_mode(), pytest.raises(RuntimeError, match="made up"):
        runner.decode_step([(0, 20)], full_vocab=False)
    assert seen == [(1, 1 if small else threads)]
    assert torch.get_num_threads() == threads


def test_captured_functions_give_the_codes_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read their inputs where these were at the capture; the same holds after a release and a second capture.

    The second one has no warm-up.
    """
    fake, pool = FakeCapture(monkeypatch), FakePool()
    streams: Any = SimpleNamespace(frame_capture="frame_capture", transfer="transfer", frame_pool=pool)
    ours = Ours("custom_voice", None, slots=9)
    runner = CudaGraphModelRunner(ours.model, streams)
    shape = ours.config.talker_config
    predictor = shape.code_predictor_config
    cached = predictor.num_hidden_layers * 2 * 16 * predictor.num_key_value_heads * predictor.head_dim
    assert runner.memory() == {"graphs": 0, "workspace": 0}
    with torch.inference_mode():
        requests = [Request(prompt=ours.prompt(case), join=place, frames=6) for place, case in enumerate(CASES[:3])]
        wanted = generate(ours, requests)
        ours.runner.close()
        for _ in range(2):
            runner.prepare()
            memory = runner.memory()
            assert memory["graphs"] == 7
            assert fake.streams == {"stream": "frame_capture"}
            assert fake.warming == ["transfer"]
            assert pool.users == 1
            # The inputs of a prompt of each captured length. And for the one batch size: the code predictor's
            # KV cache, the first layer's inputs, and cosines and sines of the first forward's two tokens.
            inputs = sum(tokens * shape.hidden_size * 4 + 2 * 8 for tokens in PREFILL_LENGTHS if tokens < 256)
            qkv = (predictor.num_attention_heads + 2 * predictor.num_key_value_heads) * predictor.head_dim
            scratch = cached + predictor.hidden_size + qkv + 2 * 2 * predictor.head_dim
            assert memory["workspace"] == inputs + 8 * 4 * scratch
            for codes, expected in zip(generate(ours, requests, runner), wanted, strict=True):
                assert torch.equal(codes, expected)
            assert sum(graph.replays for graph in fake.graphs.values()) > 3 + 2 * 6
            runner.release()
            assert pool.users == 0
            assert runner.memory() == {"graphs": 0, "workspace": 0}
