"""The stages of a step, their floors and their launches, as the engine's benchmark prints them."""

import itertools
import time

import pytest
import torch

from gpu_worker.engines.base import Job
from gpu_worker.engines.qwen.engine import QwenEngine
from shared.protocol import Sampling, Segment
from tests.benchmarks import stages
from tests.gpu_worker.engines.qwen import driving


@pytest.fixture(scope="module")
def engine() -> QwenEngine:
    """Two slots of the small checkpoint."""
    return driving.engine("custom_voice", slots=2)


def job(name: str) -> Job:
    """A job of 25 frames: with this seed the random checkpoint predicts end of speech there."""
    sampling = Sampling(seed=4, max_new_tokens=40)
    return Job(
        id=name,
        task="CustomVoice",
        segments=[Segment(text="Hello world.")],
        voice="ryan",
        language="english",
        sampling=sampling,
    )


def test_every_stage_is_timed_and_the_engine_is_restored(engine: QwenEngine) -> None:
    """Talker, code predictor and codec have times inside the block; after it the engine is unchanged."""
    engine.admit(job("timed"))
    with stages.staged(engine, time.perf_counter) as parts:
        for _ in range(4):
            engine.step(())
    engine.cancel("timed")
    assert all(parts[name] > 0 for name in ("prefill", "code predictor", "talker", "codec"))
    assert 0 < parts["of which sampling"] < parts["code predictor"] + parts["talker"]
    before = dict(parts)
    engine.admit(job("untimed"))
    engine.step(())
    engine.cancel("untimed")
    assert parts == before


def test_the_floor_counts_what_a_frame_reads(engine: QwenEngine) -> None:
    """Weights count once for any batch, the cache for each stream and token, the codec once a chunk."""
    alone = stages.floors_ms(engine, 1, 100, chunk=8, bandwidth=1e9)
    many = stages.floors_ms(engine, 4, 100, chunk=4, bandwidth=1e9)
    assert many["code predictor"] == alone["code predictor"]
    assert many["codec"] == 2 * alone["codec"]
    shape = engine._parts.runner._model.talker.cache.keys[0].shape  # type: ignore[attr-defined]
    token = 2 * 2 * shape[2] * shape[3] * 4  # keys and values of two layers, float32
    assert many["talker"] - alone["talker"] == pytest.approx(3 * 100 * token / 1e9 * 1000)


def test_launches_are_counted_a_step(engine: QwenEngine) -> None:
    """Some hundreds of operators, and the same number in a second run."""
    counts = []
    for number in range(2):
        engine.admit(job(str(number)))
        counts.append(stages.launches(engine, 1))
        engine.cancel(str(number))
    assert 500 < counts[0] < 5000
    assert counts[1] == pytest.approx(counts[0], rel=0.1)


def test_bandwidth_is_that_of_the_quickest_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes read and written in the fastest of five copies, by a fake clock."""
    monkeypatch.setitem(stages.COPY_BYTES, "cpu", 1 << 20)
    ticks = itertools.accumulate(itertools.cycle([2.0, 1.0]))
    assert stages.copy_bandwidth(torch.device("cpu"), lambda: next(ticks)) == 2 * stages.COPY_BYTES["cpu"]
