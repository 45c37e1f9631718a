"""The CPU time of a newcomer's first audio, as the benchmark measures it."""

import pytest

from tests.benchmarks import first_audio
from tests.gpu_worker.engines.qwen.driving import engine


@pytest.mark.soak
def test_a_newcomer_takes_little_more_than_on_an_idle_engine() -> None:
    """In the place of the highest slot, alone in its step: far less than in a step of all eight slots."""
    speaker = engine("custom_voice", slots=first_audio.SLOTS, max_model_len=2048)
    first_audio.heard_alone(speaker)
    alone = min(first_audio.among_others(speaker, first_audio.SLOTS - 1) for _ in range(2))
    together = min(first_audio.among_others(speaker, first_audio.SLOTS - 1, alone=False) for _ in range(2))
    assert alone < 0.8 * together
    speaker.close()
