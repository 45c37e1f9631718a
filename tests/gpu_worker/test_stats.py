"""Counters, histograms and the snapshot."""

import os
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import Done, JobError, Memory
from gpu_worker.requests import Cancelled, Request, Sink
from gpu_worker.residency.models import ModelState, Transition, TransitionDone, TransitionFailed, TransitionKind
from gpu_worker.stats import MAX_STREAMS, MEMORY_READING_S, Stats
from shared.pcm import bytes_for
from shared.protocol import (
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    Counters,
    Histogram,
    ModelStats,
    Snapshot,
    StreamState,
    Usage,
)
from tests.gpu_worker.fakes import FakeClock, FakeDevice, a_request

DONE = Done("r", "stop", Usage(input_tokens=1, output_tokens=1))


def _stats(device: FakeDevice, clock: FakeClock) -> Stats:
    return Stats(
        boot_id="b",
        default_model="m",
        settings={"idle_timeout": 5.0, "default_model": "auto"},
        restarts=3,
        probe=device,
        shared_bytes=lambda: {"codec": 3},
        clock=clock,
    )


@pytest.fixture
def clock() -> FakeClock:
    """The worker's clock."""
    return FakeClock()


@pytest.fixture
def stats(clock: FakeClock) -> Stats:
    """The stats of a worker that has just started."""
    return _stats(FakeDevice(), clock)


def _request(clock: FakeClock, request_id: str = "r", *, model: str = "m", credit: int = 1_000) -> Request:
    """A request that arrives now."""
    return a_request(
        request_id,
        client="key:0123456789abcdef and more",
        model=model,
        sink=Sink(request_id, lambda _message, _payload: None, credit),
        arrived_at=clock(),
    )


def _snapshot(stats: Stats, **changes: Any) -> Snapshot:
    given: dict[str, Any] = {
        "accepting": True,
        "running": 1,
        "queued": 2,
        "slots": 3,
        "models": [],
        "offloaded_bytes": 7,
        "cleanup": None,
        "voices": [],
        "requests": [],
    }
    return stats.snapshot(**{**given, **changes})


def _model_stats(stats: Stats, model: str = "m") -> ModelStats:
    return _snapshot(stats).model_stats[model]


def _bucket(histogram: Histogram, bounds: tuple[float, ...]) -> float:
    """The bound up to which the one value of a histogram lies."""
    assert len(histogram.counts) == len(bounds) + 1
    assert sum(histogram.counts) == 1
    return [*bounds, float("inf")][histogram.counts.index(1)]


class TestRequests:
    """Counters, and histograms of speech."""

    def test_counters(self, stats: Stats) -> None:
        """Every outcome has its own counter."""
        for _ in range(3):
            stats.request_started()
        stats.request_rejected()
        for outcome in (DONE, JobError("invalid_value", "no"), Cancelled(), Cancelled()):
            stats.request_finished(a_request(), outcome)
        assert _snapshot(stats).requests == Counters(started=3, finished=1, failed=1, cancelled=2, rejected=1)

    def test_first_audio(self, stats: Stats, clock: FakeClock) -> None:
        """The time to first audio starts at the arrival and includes the wait for a slot."""
        request = _request(clock)
        clock.advance(0.4)
        stats.first_audio(request)
        histogram = _model_stats(stats).first_audio_s
        assert histogram.sum == pytest.approx(0.4)
        assert _bucket(histogram, FIRST_AUDIO_BOUNDS_S) == 0.5

    def test_on_a_bound(self, stats: Stats, clock: FakeClock) -> None:
        """A value equal to a bound belongs to the bucket below it, as in Prometheus' `le`."""
        request = _request(clock)
        clock.advance(2.0)
        stats.first_audio(request)
        assert _bucket(_model_stats(stats).first_audio_s, FIRST_AUDIO_BOUNDS_S) == 2.0

    def test_faster_than_real_time(self, stats: Stats, clock: FakeClock) -> None:
        """The real-time factor is synthesis time by audio time, from the start on; in time means no underrun."""
        request = _request(clock)
        clock.advance(7)
        request.start(clock())
        for _ in range(4):
            clock.advance(0.25)
            request.push(bytes(bytes_for(1.0)), clock())
        stats.request_finished(request, DONE)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(0.25)
        assert _bucket(model_stats.real_time_factor, REAL_TIME_FACTOR_BOUNDS) == 0.3
        assert _bucket(model_stats.underrun_s, UNDERRUN_BOUNDS_S) == 0.0

    def test_slower_than_real_time(self, stats: Stats, clock: FakeClock) -> None:
        """The underrun is the sum of the seconds for which the player had no audio."""
        request = _request(clock)
        request.start(clock())
        for _ in range(3):
            clock.advance(1.2)
            request.push(bytes(bytes_for(1.0)), clock())
        stats.request_finished(request, DONE)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(1.2)
        assert model_stats.underrun_s.sum == pytest.approx(0.4)
        assert _bucket(model_stats.underrun_s, UNDERRUN_BOUNDS_S) == 0.5

    def test_slow_reader(self, stats: Stats, clock: FakeClock) -> None:
        """A pause of the reader is neither an underrun nor slow synthesis."""
        request = _request(clock, credit=1)
        request.start(clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        clock.advance(100)
        request.grant(5, clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        stats.request_finished(request, DONE)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(0.5)
        assert _bucket(model_stats.underrun_s, UNDERRUN_BOUNDS_S) == 0.0

    def test_no_audio(self, stats: Stats, clock: FakeClock) -> None:
        """A stream without audio has no real-time factor."""
        request = _request(clock)
        request.start(clock())
        stats.request_finished(request, DONE)
        assert _model_stats(stats).real_time_factor == Histogram()

    def test_models_apart(self, stats: Stats, clock: FakeClock) -> None:
        """Every model has its own figures; a model that did nothing has none."""
        stats.first_audio(_request(clock, model="m"))
        stats.first_audio(_request(clock, model="n"))
        assert _snapshot(stats).model_stats.keys() == {"m", "n"}


class TestTransitions:
    """Transitions of models, and their failures."""

    @pytest.mark.parametrize("kind", ["load", "restore", "offload", "drop"])
    def test_done(self, stats: Stats, kind: TransitionKind) -> None:
        """Every kind of transition has its own histogram of seconds."""
        for seconds in (0.2, 40.0):
            stats.transition_ended(
                TransitionDone(
                    transition=Transition("m", kind),
                    engine=None,
                    memory=Memory(),
                    before_bytes=0,
                    after_bytes=0,
                    seconds=seconds,
                )
            )
        model_stats = _model_stats(stats)
        assert model_stats.transitions_s.keys() == {kind}
        assert (sum(model_stats.transitions_s[kind].counts), model_stats.transitions_s[kind].sum) == (
            2,
            pytest.approx(40.2),
        )
        assert len(model_stats.transitions_s[kind].counts) == len(TRANSITION_BOUNDS_S) + 1
        assert (model_stats.failed_transitions, model_stats.out_of_memory) == ({}, 0)

    @pytest.mark.parametrize(("code", "short"), [("model_unavailable", 0), ("insufficient_vram", 1)])
    def test_failed(self, stats: Stats, code: str, short: int) -> None:
        """A failed transition has its own counter, and another one if memory was the reason."""
        load = Transition("m", "load")
        stats.transition_ended(
            TransitionFailed(transition=load, error=JobError(code, "it broke"), state=ModelState.ABSENT)
        )
        assert _model_stats(stats) == ModelStats(failed_transitions={"load": 1}, out_of_memory=short)

    def test_out_of_memory(self, stats: Stats) -> None:
        """Every time is counted."""
        stats.out_of_memory("m")
        stats.out_of_memory("m")
        assert _model_stats(stats).out_of_memory == 2


class TestStreams:
    """The open requests in a snapshot."""

    def test_states(self, stats: Stats, clock: FakeClock) -> None:
        """Requests with a slot come first. Texts are not shown, and of a client only the first characters."""
        waiting, speaking, stalled = (_request(clock, name, credit=1) for name in ("a", "b", "c"))
        clock.advance(2)
        for request in (speaking, stalled):
            request.start(clock())
        stalled.push(bytes(bytes_for(0.5)), clock())
        streams = _snapshot(stats, requests=[waiting, speaking, stalled]).streams
        assert streams == [
            StreamState(id=name, model="m", client="key:0123456789abcdef", state=state, age_s=2.0, audio_s=audio_s)
            for name, state, audio_s in (("b", "speaking", 0.0), ("c", "stalled", 0.5), ("a", "waiting", 0.0))
        ]
        assert b"secret" not in msgspec.msgpack.encode(streams)

    def test_bounded(self, stats: Stats, clock: FakeClock) -> None:
        """However many requests are open, a snapshot stays small enough to be sent several times a second."""
        requests = [_request(clock, f"{number:032x}.{number:08x}") for number in range(1_000)]
        snapshot = _snapshot(stats, requests=requests)
        assert [stream.id for stream in snapshot.streams] == [request.id for request in requests[:MAX_STREAMS]]
        assert len(msgspec.msgpack.encode(snapshot)) < 10_000


class TestSnapshot:
    """The snapshot as a whole."""

    def test_given_fields(self, stats: Stats, clock: FakeClock) -> None:
        """The snapshot has the identity of the process and the fields given to it."""
        clock.advance(12.5)
        snapshot = _snapshot(stats, accepting=False)
        assert (snapshot.pid, snapshot.boot_id, snapshot.default_model) == (os.getpid(), "b", "m")
        assert (snapshot.accepting, snapshot.running, snapshot.queued, snapshot.slots) == (False, 1, 2, 3)
        assert (snapshot.uptime_s, snapshot.host.offloaded_bytes, snapshot.shared_bytes) == (12.5, 7, {"codec": 3})
        assert snapshot.restarts == 3
        assert stats.settings == {"idle_timeout": 5.0, "default_model": "m"}

    def test_immutable(self, stats: Stats, clock: FakeClock) -> None:
        """Later events do not change a snapshot."""
        stats.first_audio(_request(clock))
        first = _snapshot(stats)
        before = msgspec.msgpack.encode(first)
        stats.first_audio(_request(clock))
        assert msgspec.msgpack.encode(first) == before

    def test_memory_readings_are_reused(self) -> None:
        """Snapshots share a reading of the memory that is at most MEMORY_READING_S old."""
        clock, device = FakeClock(), FakeDevice()
        stats = _stats(device, clock)
        assert _snapshot(stats).device.ours_bytes == 0
        before = _snapshot(stats).host
        device.on_device["m"] = device.on_host["n"] = 100
        clock.advance(MEMORY_READING_S / 2)
        snapshot = _snapshot(stats)
        assert (snapshot.device.ours_bytes, snapshot.host) == (0, before)
        clock.advance(MEMORY_READING_S / 2)
        snapshot = _snapshot(stats)
        assert snapshot.device.ours_bytes == 100
        assert snapshot.host != before
