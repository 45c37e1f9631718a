from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_worker.engines.qwen.kernels.next_codebook0 import apply_repetition_penalty, next_codebook0, sample
from gpu_worker.engines.qwen.kernels.selection import fused_kernels
from gpu_worker.engines.qwen.model.sampling import uniforms
from tests.gpu_worker.engines.qwen.kernels.distributions import (
    VOCABULARY,
    inverse,
    logits_processors,
    official,
    parameters,
)
from tests.gpu_worker.engines.qwen.kernels.interpreter import interpreted


@pytest.mark.parametrize("candidates", [64, VOCABULARY])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.9, 50, 1.0), (0.7, 1, 1.0), (1.3, 20, 0.8), (0.2, 64, 0.5), (1.0, 5, 0.01)]
)
def test_the_choice_is_that_of_transformers_processors(
    candidates: int, temperature: float, top_k: int, top_p: float
) -> None:
    """The id is the one in whose share of Transformers' distribution the uniform falls."""
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randn(200, VOCABULARY, generator=generator) * 4
    uniform = torch.rand(200, 1, generator=generator)
    ours = sample(
        scores, parameters(200, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform), candidates
    )
    wanted = inverse(official(scores, temperature=temperature, top_k=top_k, top_p=top_p), uniform)
    assert (ours == wanted).float().mean() > 0.99  # a uniform may fall within rounding of a boundary


@pytest.mark.parametrize("candidates", [64, VOCABULARY])
@pytest.mark.parametrize(("top_k", "chosen"), [(10, False), (11, True)])
def test_the_end_counts_among_top_k(candidates: int, top_k: int, chosen: bool) -> None:  # noqa: FBT001 - a column
    """The end is an id like any other: the 11th best is never sampled with top_k 10, and is with 11."""
    draws = 500
    scores = torch.full((draws, VOCABULARY), -5.0)
    scores[:, :10] = torch.linspace(1.0, 0.9, 10)
    scores[:, -1] = 0.8
    uniform = torch.from_numpy(uniforms(3, 0, draws, 1)[:draws, None])
    ours = sample(scores, parameters(draws, temperature=1.0, top_k=top_k, top_p=1.0, uniform=uniform), candidates)
    assert bool((ours == VOCABULARY - 1).any()) is chosen


def test_without_limits_every_id_can_be_sampled() -> None:
    """top_k of the whole vocabulary and top_p 1 leave the plain softmax."""
    scores = torch.randn(100, VOCABULARY, generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(100, 1, generator=torch.Generator().manual_seed(2))
    ours = sample(scores, parameters(100, temperature=1.0, top_k=VOCABULARY, top_p=1.0, uniform=uniform), VOCABULARY)
    assert (ours == inverse(scores.softmax(-1), uniform)).float().mean() > 0.97


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_frequencies_are_those_of_the_distribution(top_p: float) -> None:
    """Chi-square of 20,000 draws against the distribution that Transformers' processors leave."""
    draws = 20_000
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2
    uniform = torch.from_numpy(uniforms(7, 0, draws, 1)[:draws, None])
    many = scores.expand(draws, -1)
    ours = sample(many, parameters(draws, temperature=0.9, top_k=20, top_p=top_p, uniform=uniform), 64)
    wanted = official(scores, temperature=0.9, top_k=20, top_p=top_p)[0]
    counts = torch.bincount(ours, minlength=VOCABULARY)
    likely = wanted > 0
    assert counts[~likely].sum() == 0
    expected = wanted[likely] * draws
    chi_square = float(((counts[likely] - expected) ** 2 / expected).sum())
    freedom = int(likely.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_uniform_of_zero_is_greedy_and_the_largest_one_stays_inside() -> None:
    """The ends of the unit interval sample the best and the last candidate, never a removed one."""
    scores = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(6)) * 3
    zero, top = torch.zeros(50, 1), torch.full((50, 1), float(np.float32(1 - 2**-22)))
    limits = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}
    assert torch.equal(sample(scores, parameters(50, **limits, uniform=zero), 64), scores.argmax(-1))
    last = sample(scores, parameters(50, **limits, uniform=top), 64)
    assert (official(scores, **limits).gather(1, last[:, None]) > 0).all()


def test_a_row_of_nan_harms_no_other_row() -> None:
    """It gets some id of the vocabulary; an error would fail the whole batch."""
    scores = torch.randn(3, VOCABULARY)
    scores[1] = float("nan")
    chosen = sample(scores, parameters(3, temperature=0.9, top_k=50, top_p=1.0, uniform=torch.zeros(3, 1)), 64)
    assert chosen[0] == scores[0].argmax()
    assert chosen[2] == scores[2].argmax()
    assert 0 <= chosen[1] < VOCABULARY


def test_repetition_is_penalised_as_transformers_does() -> None:
    """Equal to the last bit, for scores of both signs, and once for an id that was sampled several times."""
    scores = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(8))
    ids = torch.randint(0, VOCABULARY, (4, 30), generator=torch.Generator().manual_seed(9))
    seen = torch.zeros(4, VOCABULARY, dtype=torch.bool).scatter_(1, torch.cat((ids, ids), 1), value=True)
    wanted = logits_processors().RepetitionPenaltyLogitsProcessor(1.05)(ids, scores)
    assert torch.equal(apply_repetition_penalty(scores, seen, torch.full((4, 1), 1.05)), wanted)


def slots(vocabulary: int, dtype: torch.dtype, *settings: tuple[float, int, float, float]) -> Any:
    """State of one slot for each (temperature, top_k, top_p, penalty): random uniforms, a tenth of all ids seen."""
    rows = len(settings)
    generator = torch.Generator().manual_seed(rows)
    temperature, top_k, top_p, penalty = torch.tensor(settings).t()[:, :, None].contiguous()
    return SimpleNamespace(
        hidden=torch.zeros(rows, 40, dtype=dtype),
        next_codebook0=torch.randint(vocabulary, (rows,), generator=generator),
        frame=torch.arange(rows) % 3,
        active=torch.ones(rows, dtype=torch.bool),
        seen=torch.rand(rows, vocabulary, generator=generator) < 0.1,
        uniform=torch.rand(rows, 3, 4, generator=generator),
        first_uniform=torch.rand(rows, 1, generator=generator),
        temperature=temperature,
        rank=torch.where(top_k > 0, top_k, vocabulary).long() - 1,
        top_p=top_p,
        penalty=penalty,
        full_vocab=torch.ones(rows, dtype=torch.bool),
    )


def copied(state: Any, shift: float = 0.0) -> Any:
    """An independent copy, with uniforms that are larger by `shift`."""
    made = SimpleNamespace(**{name: tensor.clone() for name, tensor in vars(state).items()})
    for uniform in (made.uniform, made.first_uniform):
        uniform.add_(shift).clamp_(0, 1 - 2**-22)
    return made


def assert_same_choices(state: Any, logits: Tensor, ours: Tensor, wanted: list[Tensor]) -> None:
    """Each id is the one that is wanted, or has the same score: torch's sort on the CPU leaves ties in any order.

    `wanted`: for uniforms a little smaller and larger, too. Where these differ, a rounding decides.
    """
    scores = apply_repetition_penalty(logits.float(), state.seen, state.penalty)
    ours_, *theirs = (scores.gather(1, ids[:, None]) for ids in (ours, *wanted))
    decided = (theirs[0] == theirs[1]) & (theirs[0] == theirs[2])
    assert decided.sum() >= len(logits) - 1
    assert torch.equal(ours_[decided], theirs[0][decided])


SETTINGS = [
    (0.9, 50, 1.0, 1.05),
    (1.0, 1, 1.0, 1.05),
    (0.7, 0, 1.0, 1.0),
    (1.3, 300, 0.95, 1.2),
    (0.9, 50, 0.5, 1.05),
    (0.2, 64, 0.8, 0.8),
    (1.0, 5, 1e-6, 1.05),
    (5.0, 0, 0.9, 1.5),
]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "tied"),
    [
        (torch.float32, VOCABULARY, False),
        (torch.bfloat16, VOCABULARY, True),
        (torch.bfloat16, 65, False),
        (torch.float16, 65, True),
    ],
    ids=str,
)
def test_the_kernel_chooses_as_torch(dtype: torch.dtype, vocabulary: int, *, tied: bool) -> None:
    """For equal uniforms, in prompts and in frames, and for hundreds of equal scores: the same ids, the same state."""
    generator = torch.Generator().manual_seed(vocabulary)
    state = slots(vocabulary, dtype, *SETTINGS)
    rows = len(SETTINGS)
    logits = 3 * torch.randn(rows, vocabulary, generator=generator)
    logits = (logits.round() if tied else logits).to(dtype)
    padded = torch.full((rows, vocabulary + 7), float("inf")).to(dtype)  # as the talker's head pads them
    padded[:, :vocabulary] = logits
    hidden = torch.randn(rows, 40, generator=generator).to(dtype)
    state.active[1] = False
    prompts = torch.randperm(rows, generator=generator)
    for of_prompts in (prompts, None):
        ours, theirs = copied(state), copied(state)
        near = [copied(state, -1e-5), copied(state, 1e-5)]
        given = (padded[:, :vocabulary], hidden, of_prompts)
        sampled = fused_kernels().next_codebook0(ours, *given, min_frames=2, full_vocab=True)
        wanted = [next_codebook0(one, *given, min_frames=2, full_vocab=True) for one in (theirs, *near)]
        by_slot = logits if of_prompts is None else logits[prompts.argsort()]
        assert_same_choices(theirs, by_slot, ours.next_codebook0, [one.next_codebook0 for one in (theirs, *near)])
        if of_prompts is None:
            assert_same_choices(theirs, logits, sampled, wanted)
        assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("frame", "seen", "hidden"))
        assert torch.equal(ours.frame, state.frame if of_prompts is not None else state.frame + state.active)


@interpreted
def test_the_kernel_never_ends_early() -> None:
    """The end, by far the best, is not sampled in the first two frames, and is then."""
    state = slots(65, torch.float32, *[(0.9, 50, 1.0, 1.05)] * 3)
    logits = torch.zeros(3, 65)
    logits[:, -1] = 50
    sampled = fused_kernels().next_codebook0(state, logits, state.hidden.clone(), None, min_frames=2, full_vocab=False)
    assert (sampled == 64).tolist() == [False, True, True]


@interpreted
def test_the_kernel_keeps_the_best_of_any_top_p() -> None:
    """With top_p 0 the best remains, of several the first, wherever the uniform falls."""
    state = slots(65, torch.float32, *[(1.0, 0, 0.0, 1.0)] * 3)
    logits = torch.zeros(3, 65)
    logits[1, 7] = logits[1, 9] = 1e-3
    sampled = fused_kernels().next_codebook0(
        state, logits, state.hidden.clone(), torch.arange(3), min_frames=2, full_vocab=True
    )
    assert sampled.tolist() == [0, 7, 0]


@interpreted
def test_top_p_divides_equal_scores_by_their_ids() -> None:
    """Of ten equal ones, top_p 0.55 keeps the first six, as the reference does after a stable sort."""
    state = slots(65, torch.float32, *[(1.0, 0, 0.55, 1.0)] * 3)
    state.first_uniform[:] = torch.tensor([[0.0], [0.55], [1 - 2**-22]])
    logits = torch.full((3, 65), -100.0)
    logits[:, 20:30] = 0
    sampled = fused_kernels().next_codebook0(
        state, logits, state.hidden.clone(), torch.arange(3), min_frames=2, full_vocab=True
    )
    assert sampled.tolist() == [20, 23, 25]
