"""Percentiles and underruns of the last minutes."""

import msgspec
import pytest

from gpu_worker.performance import Performance
from shared.protocol import Distribution
from tests.gpu_worker.fakes import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    """The worker's clock."""
    return FakeClock()


@pytest.fixture
def performance(clock: FakeClock) -> Performance:
    """The figures of a worker that has just started."""
    return Performance(clock)


def _counts(performance: Performance, clock: FakeClock) -> list[int]:
    """The requests with a first audio in each window of "m", a moment later; none if the model is not there."""
    clock.advance(1.0)
    return [window.first_audio_s.count for window in performance.report().get("m", [])]


def test_percentiles(performance: Performance, clock: FakeClock) -> None:
    """Percentiles are within 7.5 % of the true ones, from milliseconds to minutes."""
    for number in range(1, 1_001):
        performance.first_audio("m", number / 100)
        performance.queue_wait("m", number / 10_000)
        performance.speech_made("m", number / 1_000, 0.0)
    clock.advance(1.0)
    window = performance.report()["m"][0]
    for found, largest in (
        (window.first_audio_s, 10.0),
        (window.queue_wait_s, 0.1),
        (window.real_time_factor, 1.0),
    ):
        assert found.count == 1_000
        for share, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
            assert value == pytest.approx(share * largest, rel=0.075)


@pytest.mark.parametrize(("seconds", "shown"), [(0.0, 0.0005), (1e-9, 0.0005), (1e9, 1_000.0)])
def test_extremes(performance: Performance, clock: FakeClock, seconds: float, shown: float) -> None:
    """Values beyond the histogram are kept in its first and its last bucket."""
    performance.queue_wait("m", seconds)
    clock.advance(1.0)
    assert performance.report()["m"][0].queue_wait_s.p50 == pytest.approx(shown)


def test_windows(performance: Performance, clock: FakeClock) -> None:
    """A request leaves the windows of 1, 15 and 60 minutes one after the other, and its model at last."""
    performance.first_audio("m", 0.5)
    for passed_s, expected in (
        (57.0, [1, 1, 1]),
        (13.0, [0, 1, 1]),
        (13.8 * 60, [0, 1, 1]),
        (61.0, [0, 0, 1]),
        (44 * 60, [0, 0, 1]),
        (121.0, []),
    ):
        clock.advance(passed_s)
        assert _counts(performance, clock) == expected, f"{clock() - 1_000} s later"


def test_slots_are_used_again(performance: Performance, clock: FakeClock) -> None:
    """Hours of requests count only where they belong, and a pause of hours forgets them all."""
    for _ in range(200):
        performance.first_audio("m", 0.5)
        clock.advance(60.0)
    assert _counts(performance, clock) == [1, 15, 60]
    clock.advance(100 * 3_600.0)
    assert _counts(performance, clock) == []


def test_underruns(performance: Performance, clock: FakeClock) -> None:
    """A player that starts later by its buffer waits less: only a longer underrun counts."""
    for underrun_s in (0.0, 0.05, 0.1, 0.2, 0.9, 5.0):
        performance.speech_made("m", 0.5, underrun_s)
    clock.advance(1.0)
    window = performance.report()["m"][0]
    assert window.streams == 6
    assert window.underruns == {"0": 5, "100": 3, "300": 2, "1000": 1}


def test_batches(performance: Performance, clock: FakeClock) -> None:
    """Batch sizes are exact; a size that no engine has counts as the largest."""
    performance.batches("m", 1, 50)
    performance.batches("m", 7, 45)
    performance.batches("m", 10_000, 5)
    clock.advance(1.0)
    assert performance.report()["m"][0].batch_size == Distribution(count=100, p50=1.0, p95=7.0, p99=256.0)


def test_nothing(performance: Performance, clock: FakeClock) -> None:
    """Figures without a value have no percentiles: a stream without audio has no real-time factor."""
    assert performance.report() == {}
    performance.speech_made("m", None, 0.0)
    clock.advance(1.0)
    window = performance.report()["m"][0]
    assert (window.real_time_factor, window.first_audio_s) == (Distribution(), Distribution())


def test_size(performance: Performance, clock: FakeClock) -> None:
    """A report is small, whatever was recorded, and made once a second at most."""
    for number in range(2_000):
        for model in ("m", "n"):
            performance.first_audio(model, number / 7)
            performance.batches(model, number % 128, 1)
        clock.advance(2.0)
    report = performance.report()
    assert len(msgspec.msgpack.encode(report)) < 3_000
    performance.first_audio("o", 1.0)
    assert performance.report() is report
