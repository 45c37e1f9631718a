"""The branch that the engine takes on CUDA, on a virtual device. tests/gpu has what only a GPU can show."""

import pytest

from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen.driving import engine, job, run
from tests.gpu_worker.engines.qwen.virtual_cuda import install


def test_speech_is_that_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of many lengths that join at odd moments have the samples that they have on a CPU."""
    jobs = [job(number, sampling=Sampling(seed=number, max_new_tokens=1 + 3 * number)) for number in range(8)]
    on_cpu = engine("custom_voice")
    wanted = run(on_cpu, jobs)
    on_cpu.close()
    speaker = install(monkeypatch).engine(slots=4)
    spoken = run(speaker, jobs, every=3)
    for name, outcome in wanted.items():
        assert spoken[name].pcm == outcome.pcm
        assert spoken[name].end == outcome.end
    speaker.close()
