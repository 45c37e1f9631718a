"""The order of work on a device that computes beside the host, on a virtual clock.

Its figures are those of the order alone: the same on every machine.
"""

import random
from collections.abc import Iterator

import pytest

from gpu_worker.engines.qwen.engine import QwenEngine
from shared.protocol import Sampling
from tests.gpu_worker.engines.qwen import simulation
from tests.gpu_worker.engines.qwen.driving import job
from tests.gpu_worker.engines.qwen.simulation import (
    ADMIT_S,
    PREFILL_HOST_S,
    PREFILL_S,
    STEP_HOST_S,
    Heard,
    device_time,
    first_audio,
    frame_s,
    serve,
)
from tests.gpu_worker.engines.qwen.virtual_cuda import VirtualCuda, install

HOST_S = ADMIT_S + PREFILL_HOST_S + STEP_HOST_S
DECODE_S = device_time(("decode", 1, 1))


@pytest.fixture(scope="module")
def device() -> Iterator[tuple[VirtualCuda, QwenEngine]]:
    """A virtual device, and an engine with 64 slots on it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cuda = install(monkeypatch, simulation.device_time, computes=False)
        engine = cuda.engine(slots=64, dtype="bfloat16")
        speak(cuda, engine, 0.0)  # the engine learns how long a frame takes
        yield cuda, engine
        engine.close()


def speak(cuda: VirtualCuda, engine: QwenEngine, *after_s: float, frames: int = 40) -> list[Heard]:
    """Equal requests, each so many seconds from now."""
    start = cuda.now
    requests = [
        (start + seconds, job(number, sampling=Sampling(seed=number, max_new_tokens=frames)))
        for number, seconds in enumerate(after_s)
    ]
    return list(serve(cuda, engine, requests).values())


def test_first_audio_waits_for_nothing_but_its_own_work(device: tuple[VirtualCuda, QwenEngine]) -> None:
    """From admission on: the host's work, prefill, one frame, the first decode, and a tenth of that."""
    (alone,) = speak(*device, 0.0)
    assert alone.first_audio_s <= 1.1 * (HOST_S + PREFILL_S + frame_s(1) + DECODE_S)


def test_every_chunk_is_handed_out_when_it_is_done(device: tuple[VirtualCuda, QwenEngine]) -> None:
    """A frame after the chunk before it and the decode: no chunk waits for a frame that it does not need."""
    (alone,) = speak(*device, 0.0)
    gaps = [after - before for before, after in zip(alone.times[:-1], alone.times[1:], strict=True)]
    for gap, frames in zip(gaps, (1, 2, 4, 8, 8, 8), strict=False):
        longer_decode = device_time(("decode", 1, frames)) - DECODE_S
        assert gap <= frames * frame_s(1) + longer_decode + 1e-3


def test_a_newcomer_delays_nobody_by_more_than_a_frame(device: tuple[VirtualCuda, QwenEngine]) -> None:
    """Whenever within a frame it comes, the others have each chunk at most a frame later than without it."""
    for moment in range(8):
        (alone,) = speak(*device, 0.0)
        joined, _ = speak(*device, 0.0, 0.2 + moment * 1e-3)
        for lonely, crowded in zip(alone.times, joined.times, strict=True):
            assert crowded - joined.came <= lonely - alone.came + frame_s(2) + 1e-3


def test_the_prompt_of_a_newcomer_stands_before_the_next_frame(device: tuple[VirtualCuda, QwenEngine]) -> None:
    """It waits for the frame on the device, not for one more behind it."""
    for moment in range(8):
        _, newcomer = speak(*device, 0.0, 0.2 + moment * 1e-3)
        assert newcomer.first_audio_s <= 1.1 * (frame_s(2) + HOST_S + PREFILL_S + frame_s(2) + DECODE_S) + 1e-3


@pytest.mark.parametrize("longest_pause_s", [2e-4, 3e-3])
def test_the_device_never_runs_dry(
    device: tuple[VirtualCuda, QwenEngine], longest_pause_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames follow each other without a gap; if the host wakes up to 3 ms late, they take at most 5 % longer."""
    cuda, engine = device
    pauses = random.Random(0)  # noqa: S311 -- no secret
    monkeypatch.setattr(cuda, "sleep", lambda seconds: cuda.work(max(seconds, pauses.uniform(0, longest_pause_s))))
    start, frames = cuda.now, cuda.replays.copy()
    speak(cuda, engine, *[0.0] * 4, frames=60)
    frames = cuda.replays - frames
    made = sum(number for (name, _, _), number in frames.items() if name == "talker_step")
    allowed = 1.005 if longest_pause_s < 1e-3 else 1.05
    assert made == 60
    assert cuda.now - start <= allowed * made * frame_s(4) + HOST_S + 4 * (ADMIT_S + PREFILL_HOST_S) + PREFILL_S + 5e-3


@pytest.mark.parametrize(("rate", "p50_ms", "p95_ms"), [(1, 10, 11), (5, 10, 14), (10, 12, 15), (20, 13, 17)])
def test_first_audio_at_a_rate(
    device: tuple[VirtualCuda, QwenEngine], rate: float, p50_ms: float, p95_ms: float
) -> None:
    """The figures that `python -m tests.benchmarks.first_audio` prints. They may only become lower."""
    cuda, engine = device
    p50, p95 = first_audio(cuda, engine, rate)
    assert p50 * 1000 <= p50_ms
    assert p95 * 1000 <= p95_ms
