"""Sampling as a request and the checkpoint's generation_config.json together ask for it."""

import pytest

from gpu_worker.engines.base import Sampling
from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig
from gpu_worker.engines.qwen.planner import choice_of

OWN = GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3)


def test_the_checkpoints_own_parameters_are_the_default() -> None:
    """Each of them holds until the request names another."""
    own = choice_of(Sampling(), OWN)
    assert (own.temperature, own.top_k, own.top_p, own.repetition_penalty) == (0.7, 20, 0.8, 1.3)
    assert not own.greedy
    assert not own.greedy_codes
    asked = Sampling(temperature=1.1, top_k=5, top_p=0.9, repetition_penalty=1.0)
    choice = choice_of(asked, OWN)
    assert (choice.temperature, choice.top_k, choice.top_p, choice.repetition_penalty) == (1.1, 5, 0.9, 1.0)


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-38, True), (1e-6, True), (0.01, False)])
def test_the_coldest_temperatures_are_greedy(temperature: float, greedy: bool) -> None:  # noqa: FBT001 -- a parameter
    """Dividing by them would leave the range of float32, and the worst candidate would be taken for the best."""
    assert choice_of(Sampling(temperature=temperature), OWN).greedy == greedy


def test_do_sample_is_the_talkers_alone() -> None:
    """Without it the talker takes its best candidate; the code predictor does so where its own switch says that."""
    talker = choice_of(Sampling(), GenerationConfig(do_sample=False))
    assert (talker.greedy, talker.top_k, talker.greedy_codes) == (False, 1, False)
    both = choice_of(Sampling(), GenerationConfig(do_sample=False, subtalker_dosample=False))
    assert both.greedy
    codes = choice_of(Sampling(), GenerationConfig(subtalker_dosample=False))
    assert (codes.greedy, codes.greedy_codes) == (False, True)
    asked = choice_of(Sampling(temperature=0.9), GenerationConfig(do_sample=False))
    assert (asked.greedy, asked.top_k) == (False, 50)
