"""The variables that a reload sends to the GPU worker: taken all or not at all."""

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.live_settings import LiveSettings
from shared.settings import Settings


def test_variables_are_taken() -> None:
    """Over those of the process; "" takes one away, and what is equal is not applied again."""
    applied: list[Settings] = []
    live = LiveSettings({"TTS_MAX_QUEUE": "9", "TTS_IDLE_TIMEOUT": "60", "PATH": "/bin"}, applied.append)
    live.take({"TTS_IDLE_TIMEOUT": "", "TTS_VRAM_BUDGET_MB": "100"})
    live.take({"TTS_IDLE_TIMEOUT": "", "TTS_VRAM_BUDGET_MB": "100"})
    (settings,) = applied
    assert (settings.max_queue, settings.idle_timeout_s, settings.vram_budget_mb) == (9, 300, 100)
    live.take({"TTS_MAX_QUEUE": "3"})
    assert (applied[-1].max_queue, applied[-1].vram_budget_mb) == (3, 100)


@pytest.mark.parametrize("wrong", [{"TTS_MAX_QUEUE": "no"}, {"TTS_DTYPE": "float32"}, {"TTS_API_KEYS": "sk"}])
def test_a_mistake_changes_nothing(wrong: dict[str, str]) -> None:
    """A wrong value, a setting that needs a restart, a setting of the web side."""
    applied: list[Settings] = []
    live = LiveSettings({}, applied.append)
    with pytest.raises(JobError) as raised:
        live.take({"TTS_IDLE_TIMEOUT": "60", **wrong})
    assert raised.value.code == "invalid_value"
    live.take({"TTS_STALL_TIMEOUT": "5"})
    assert applied[-1].idle_timeout_s == 300
