"""The frame cap of an utterance, and sampling parameters from a request and generation_config.json."""

import pytest

from gpu_worker.engines.qwen.checkpoint.model_config import GenerationConfig
from gpu_worker.engines.qwen.planner import frame_cap, sampling_params
from shared.protocol import Sampling

CHECKPOINT = GenerationConfig(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.3)


@pytest.mark.parametrize(
    ("tokens", "wanted", "room", "cap"),
    [(1, 2048, 2000, 192), (50, 2048, 2000, 600), (50, 10, 2000, 10), (50, 2048, 99, 99)],
)
def test_the_frame_cap_follows_the_text(tokens: int, wanted: int, room: int, cap: int) -> None:
    """The cap is max(192, 12 frames a token), but at most the requested frames and the room in the slot."""
    assert frame_cap(tokens, wanted, room) == cap


def test_the_checkpoints_parameters_are_the_default() -> None:
    """A request replaces each of them by naming it."""
    default = sampling_params(Sampling(), CHECKPOINT)
    assert (default.temperature, default.top_k, default.top_p, default.repetition_penalty) == (0.7, 20, 0.8, 1.3)
    assert not default.greedy
    assert not default.greedy_codes
    requested = Sampling(temperature=1.1, top_k=5, top_p=0.9, repetition_penalty=1.0)
    params = sampling_params(requested, CHECKPOINT)
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (1.1, 5, 0.9, 1.0)


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-38, True), (1e-6, True), (0.01, False)])
def test_the_lowest_temperatures_are_greedy(temperature: float, greedy: bool) -> None:  # noqa: FBT001 -- a parameter
    """Logits divided by them would leave the range of float32, and the worst code could win."""
    assert sampling_params(Sampling(temperature=temperature), CHECKPOINT).greedy == greedy


def test_do_sample_concerns_the_talker_alone() -> None:
    """Without do_sample the talker is greedy. The code predictor is greedy only without subtalker_dosample."""
    talker = sampling_params(Sampling(), GenerationConfig(do_sample=False))
    assert (talker.greedy, talker.top_k, talker.greedy_codes) == (False, 1, False)
    both = sampling_params(Sampling(), GenerationConfig(do_sample=False, subtalker_dosample=False))
    assert both.greedy
    codes = sampling_params(Sampling(), GenerationConfig(subtalker_dosample=False))
    assert (codes.greedy, codes.greedy_codes) == (False, True)
    requested = sampling_params(Sampling(temperature=0.9), GenerationConfig(do_sample=False))
    assert (requested.greedy, requested.top_k) == (False, 50)
