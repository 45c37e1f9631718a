"""A prefill delays the frames of running jobs, so a step reads only so many prompt tokens."""

import pytest

from gpu_worker.engines.qwen import engine as engine_module
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import Outcome, assemble, job, kept_parts, take


def first_steps(jobs: int) -> list[int]:
    """The step that brings each job's first audio, of `jobs` equal jobs that come together."""
    speaker = assemble(kept_parts("custom_voice", traced=False, slots=12))
    equal = [job(number, "hello world " * 40, sampling=Sampling(seed=0, max_new_tokens=2)) for number in range(jobs)]
    outcomes = {one.id: Outcome() for one in equal}
    for one in equal:
        speaker.admit(one)
    for number in range(4):
        take(speaker, outcomes, number)
    return [outcomes[one.id].steps[0] for one in equal]


def test_a_step_reads_prompts_within_its_budget() -> None:
    """Of twelve jobs, the first step begins as many as the budget holds, and the next step the others, in order."""
    steps = first_steps(12)
    at_once = steps.count(0)
    assert 6 <= at_once < 12
    assert steps == [0] * at_once + [1] * (12 - at_once)


def test_a_step_reads_one_prompt_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if that prompt alone has more tokens than the budget."""
    monkeypatch.setattr(engine_module, "MAX_PREFILL_TOKENS", 1)
    assert first_steps(3) == [0, 1, 2]
