"""The benchmark of open requests, for a second of the virtual clock: it counts each word, and none waits for others."""

import numpy as np
import pytest

from tests.benchmarks import open_text
from tests.gpu_worker.engines.qwen import simulation
from tests.gpu_worker.engines.qwen.virtual_cuda import install


def test_each_word_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole requests are spoken beside them; a frame takes 8 ms, and a word of several tokens needs one."""
    monkeypatch.setattr(open_text, "SECONDS", 0.5)
    monkeypatch.setattr(open_text, "WHOLE", 4)
    cuda = install(monkeypatch, simulation.device_time, computes=False)
    engine = cuda.engine(slots=8, dtype="bfloat16")
    times = open_text.measure(cuda, engine, 3)
    assert len(times) == 3 * open_text.WORDS_A_REQUEST
    assert min(times) > 0
    assert np.percentile(times, 50) < 0.04
    assert engine.capacity() == 8
    engine.close()
