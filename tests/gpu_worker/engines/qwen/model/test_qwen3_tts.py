import pytest
import torch

from gpu_worker.engines.qwen.model import attention as attention_module
from gpu_worker.engines.qwen.model.attention import Flash, Sdpa
from gpu_worker.engines.qwen.model.sampling import SamplingParams
from gpu_worker.engines.qwen.runner import CudaGraphModelRunner
from gpu_worker.engines.qwen.runtime.captured_buckets import BATCH_SIZES
from gpu_worker.engines.qwen.runtime.cuda_streams import CudaStreams
from tests.gpu_worker.engines.qwen import parity
from tests.gpu_worker.engines.qwen.model.test_attention import plain_flash
from tests.gpu_worker.engines.qwen.parity import (
    CASES,
    FEW_FRAMES,
    FRAMES,
    GREEDY,
    LONG_RUNS,
    Expected,
    Ours,
    Request,
    expected,
    generate,
    greedy_run,
    official,
    our_model,
)

SAMPLED = SamplingParams(greedy=False, temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.05)


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("index", range(len(CASES)))
def test_prompts_and_codes_equal_the_official_ones(index: int) -> None:
    """In every layout, prompt and trailing text are equal to the last bit, and the greedy codes are the same."""
    check_greedy(index, expected(index), FRAMES if index in LONG_RUNS else FEW_FRAMES)


@pytest.mark.soak
@pytest.mark.parametrize("index", sorted(set(range(len(CASES))) - set(LONG_RUNS)))
def test_long_runs_equal_the_official_ones(index: int) -> None:
    """So are the codes of the other layouts, beyond the end of their texts."""
    check_greedy(index, greedy_run(index, FRAMES), FRAMES)


def check_greedy(index: int, wanted: Expected, frames: int) -> None:
    """Compare so many frames of our greedy run of a case with the official one, or all where it ends before."""
    case = CASES[index]
    ours = our_model(case.kind, case.size)
    prompt = ours.prompt(case)
    assert torch.equal(prompt.embeds, wanted.embeds)
    assert torch.equal(prompt.trailing, wanted.trailing)
    (codes,) = generate(ours, [Request(prompt=prompt, frames=frames)])
    assert torch.equal(codes, wanted.codes[:frames])


@pytest.mark.parametrize("kind", ["custom_voice", "base"])
def test_a_mixed_batch_gives_the_official_codes(kind: str) -> None:
    """Requests of all layouts join, leave early and take over slots; each one's codes stay those of it alone.

    Alone they are the official ones, as the tests above show.
    """
    numbers = [i for i, case in enumerate(CASES) if case.kind == kind and case.size is None]
    ours = our_model(CASES[numbers[0]].kind)
    requests = [
        Request(prompt=ours.prompt(CASES[number]), join=3 * round_ + place % 3, frames=FRAMES if round_ < 2 else 4)
        for round_ in range(3)
        for place, number in enumerate(numbers)
    ]
    together = generate(ours, requests)
    for place in range(len(numbers)):
        (alone,) = generate(ours, [requests[place]])
        for codes, request in zip(together[place :: len(numbers)], requests[place :: len(numbers)], strict=True):
            assert torch.equal(codes, alone[: request.frames])


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_backends_give_the_same_codes(backend: str) -> None:
    """Both portable backends give the codes of the official eager one."""
    ours = Ours("base", None, backend=backend)
    (codes,) = generate(ours, [Request(prompt=ours.prompt(CASES[12]))])
    assert torch.equal(codes, expected(12).codes[: len(codes)])


def test_a_seed_gives_the_same_codes_alone_and_in_a_batch() -> None:
    """Sampled codes depend on request and seed alone, not on the batch or the slot."""
    ours = our_model("custom_voice")
    cases = [case for case in CASES if case.kind == "custom_voice" and case.size is None]
    full_vocab = SamplingParams(greedy=False, temperature=1.1, top_k=0, top_p=1.0, repetition_penalty=1.2)
    requests = [
        Request(
            prompt=ours.prompt(case),
            seed=10 * round_ + place,
            join=round_ + 2 * place,
            frames=10,
            params=(SAMPLED, full_vocab, GREEDY)[(round_ + place) % 3],
        )
        for round_ in range(2)
        for place, case in enumerate(cases)
    ]
    together = generate(ours, requests)
    for request, codes in zip(requests, together, strict=True):
        (alone,) = generate(ours, [request])
        assert torch.equal(codes, alone)
    other = generate(ours, [Request(prompt=requests[0].prompt, seed=99, frames=10, params=SAMPLED)])[0]
    assert not torch.equal(other[: len(together[0])], together[0][: len(other)])


@pytest.mark.parametrize(
    "kernel", [Sdpa(torch.float32), Sdpa(torch.float32, heads_by_group=True), Flash(torch.float32, heads_by_group=True)]
)
def test_fixed_shapes_give_the_same_codes(monkeypatch: pytest.MonkeyPatch, kernel: Sdpa) -> None:
    """Padded prompts, masked caches and rows of padding, as graphs need them, give the codes of true lengths.

    So do the lengths that FlashAttention 2 gets, and the order of heads that fused kernels leave.
    """
    monkeypatch.setattr(attention_module, "flash_kernel", plain_flash)
    monkeypatch.setattr(parity, "attention", lambda *_: kernel)
    ours = Ours("custom_voice", None, slots=BATCH_SIZES[3] + 1)
    cache = ours.model.talker.cache
    assert (cache.reads_lengths, cache.heads_by_group) == (kernel.reads_lengths, kernel.heads_by_group)
    requests = [
        Request(prompt=ours.prompt(case), join=place, frames=10)
        for place, case in enumerate(case for case in CASES if case.kind == "custom_voice" and case.size is None)
    ]
    padded = generate(ours, requests, CudaGraphModelRunner(ours.model, CudaStreams()))
    for codes, wanted in zip(padded, generate(our_model("custom_voice"), requests), strict=True):
        assert torch.equal(codes, wanted)


def test_an_inactive_slot_keeps_its_state() -> None:
    """Once the slot is active again, it gives the codes that it would have given without the pause."""
    ours = our_model("custom_voice")
    state, runner = ours.model.state, ours.runner
    prompt = ours.prompt(CASES[0])
    (wanted,) = generate(ours, [Request(prompt=prompt, frames=6, params=SAMPLED)])
    codes = generate(ours, [Request(prompt=prompt, frames=3, params=SAMPLED)])[0]
    state.active.zero_()
    state.active[1] = True
    before = state.next_codebook0.clone(), state.hidden.clone(), state.frame.clone()
    runner.decode_step([(1, 20)], full_vocab=False)
    for old, new in zip(before, (state.next_codebook0, state.hidden, state.frame), strict=True):
        assert torch.equal(old[0], new[0])
    state.active[0] = True
    for frame in range(3, 6):
        runner.decode_step([(0, len(prompt.embeds) + frame + 1)], full_vocab=False)
    assert torch.equal(torch.cat((codes, state.ring_buffer[0, 3:6])), wanted)


def test_reduced_precision_follows_the_official_rounding() -> None:
    """Teacher-forced bfloat16 logits are as near to the official bfloat16 ones as rounding allows.

    Rounding in other places than the official modules costs audible quality. The measure is the distance of the
    official bfloat16 logits to float32 ones.
    """
    wanted = expected(0)
    codes = wanted.codes[:10]
    ours = Ours("custom_voice", None, backend="eager", dtype=torch.bfloat16)
    exact = our_model("custom_voice")
    inputs = torch.cat((wanted.embeds, exact.model.embed_codes(codes) + wanted.trailing[:1]))

    def official_logits(dtype: torch.dtype) -> torch.Tensor:
        talker = official("custom_voice", None, dtype).model.talker
        return talker.codec_head(talker.model(inputs_embeds=inputs[None].to(dtype)).last_hidden_state)[0]

    reference, theirs = official_logits(torch.float32), official_logits(torch.bfloat16)
    start = len(wanted.embeds)
    slot, length = torch.tensor([0]), torch.tensor([start])
    logits = [ours.model.talker.prefill(inputs[None, :start].bfloat16(), slot, length)[1]]
    for position in range(start, len(inputs)):
        x = inputs[position : position + 1].bfloat16().expand(4, -1)
        positions = torch.tensor([position, 0, 0, 0])
        logits.append(ours.model.talker.decode(x, positions, positions + 1, 0)[1][:1])
    mine = torch.cat(logits).float()[:, : ours.config.talker_config.codes]
    reference, theirs = (x[start - 1 :, : mine.shape[1]].float() for x in (reference, theirs))
    assert (mine - theirs).abs().mean() < 0.1 * (theirs - reference).abs().mean()
    assert (mine.argmax(1) == theirs.argmax(1)).float().mean() > 0.8
