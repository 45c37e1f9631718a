"""Newcomers' prompts share a step with those who speak already, so only so many tokens of them are read at once."""

from gpu_worker.engines.base import Sampling
from gpu_worker.engines.qwen.engine import MAX_PREFILL_TOKENS
from tests.gpu_worker.engines.qwen.driving import Outcome, engine, job, take


def test_prompts_are_read_within_the_budget_of_a_step() -> None:
    """Of twelve jobs that come together, a step begins as many as its budget holds; the others follow in order."""
    speaker = engine("custom_voice", slots=12)
    jobs = [job(number, "hello world " * 40, sampling=Sampling(seed=number, max_new_tokens=2)) for number in range(12)]
    outcomes = {one.id: Outcome() for one in jobs}
    for one in jobs:
        speaker.admit(one)
    length = speaker._jobs[jobs[0].id].length
    at_once = MAX_PREFILL_TOKENS // length
    assert 6 <= at_once < 12
    for number in range(4):
        take(speaker, outcomes, number)
    first_heard = [outcomes[one.id].steps[0] for one in jobs]
    assert first_heard == [0] * at_once + [1] * (12 - at_once)
    speaker.close()
