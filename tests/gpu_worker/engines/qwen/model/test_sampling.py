import functools
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from gpu_worker.engines.qwen.model.sampling import (
    SamplingTensors,
    apply_repetition_penalty,
    sample,
    sample_fixed,
    topk,
    uniforms,
)

VOCABULARY = 2049


def parameters(rows: int, *, temperature: float, top_k: int, top_p: float, uniform: torch.Tensor) -> SamplingTensors:
    """The same parameters for every row."""
    return SamplingTensors(
        torch.full((rows, 1), temperature),
        torch.full((rows, 1), top_k - 1),
        torch.full((rows, 1), top_p),
        torch.ones(rows, 1),
        uniform,
    )


@functools.cache
def logits_processors() -> Any:
    """Those of Transformers: their import takes seconds, which a process that only collects this file is spared."""
    return importlib.import_module("transformers.generation.logits_process")


def official(scores: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The probabilities that Transformers' processors leave."""
    made = logits_processors()
    processors = made.LogitsProcessorList([made.TemperatureLogitsWarper(temperature), made.TopKLogitsWarper(top_k)])
    if top_p < 1:
        processors.append(made.TopPLogitsWarper(top_p))
    return processors(torch.zeros(len(scores), 0, dtype=torch.int64), scores).softmax(-1)


def inverse(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The ids that the uniforms choose by the inverse of the cumulative distribution, best first."""
    values, ids = probabilities.sort(descending=True, stable=True)
    cumulative = values.double().cumsum(-1)
    return ids.gather(1, torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True))[:, 0]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_code_predictors_sampler_gives_the_same_ids(dtype: torch.dtype) -> None:
    """In reduced precision, with all of its ties, as well."""
    logits = (torch.randn(300, 2048, generator=torch.Generator().manual_seed(4)) * 4).to(dtype)
    uniform = torch.rand(300, 1, generator=torch.Generator().manual_seed(5))
    ours = sample_fixed(logits, uniform, top_k=50, temperature=0.9)
    probabilities = official(logits.float(), temperature=0.9, top_k=50, top_p=1.0)
    wanted = inverse(probabilities, uniform)
    # Among ties any order will do: equal probabilities are equal choices.
    same = probabilities.gather(1, ours[:, None]) == probabilities.gather(1, wanted[:, None])
    assert same.float().mean() > 0.99


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


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("vocabulary", [2048, 2049, 100])
def test_topk_is_that_of_torch(rows: int, vocabulary: int) -> None:
    """Selecting groups first changes nothing, even if the vocabulary is not a multiple of the group."""
    scores = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(rows))
    scores[:, -1] = 9.0
    for ours, wanted in zip(topk(scores, 50), scores.topk(50), strict=True):
        assert torch.equal(ours, wanted)


def test_randomness_belongs_to_seed_and_utterance() -> None:
    """More frames extend the uniforms, another seed or utterance changes them all, and 1 is never reached."""
    assert np.array_equal(uniforms(5, 0, 10, 16), uniforms(5, 0, 20, 16)[:161])
    assert not np.array_equal(uniforms(5, 0, 10, 16), uniforms(5, 1, 10, 16))
    assert not np.array_equal(uniforms(5, 0, 10, 16), uniforms(6, 0, 10, 16))
    assert uniforms(-1, 0, 1, 16).dtype == np.float32
    assert uniforms(1, 0, 100_000, 16).max() <= np.float32(1 - 2**-22)
