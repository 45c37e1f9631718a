"""The figures of the process."""

import os
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import Job, JobError, Memory
from gpu_worker.requests import PeerSink, Request
from gpu_worker.residency.models import ModelState, Transition, TransitionDone, TransitionFailed, TransitionKind
from gpu_worker.stats import MOST_STREAMS, READING_S, Stats
from shared.pcm import bytes_for
from shared.protocol import (
    FIRST_AUDIO_BOUNDS_S,
    MOVE_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    UNDERRUN_BOUNDS_S,
    Counters,
    Histogram,
    ModelFigures,
    Snapshot,
    StreamState,
)
from tests.gpu_worker.fakes import FakeClock, FakeDevice


def _reporter(device: FakeDevice, clock: FakeClock) -> Stats:
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
    """The time of a test."""
    return FakeClock()


@pytest.fixture
def reporter(clock: FakeClock) -> Stats:
    """A reporter of a worker that has just started."""
    return _reporter(FakeDevice(), clock)


def _request(clock: FakeClock, request_id: str = "r", *, model: str = "m", credit: int = 1_000) -> Request:
    """A request that arrives now."""
    return Request(
        peer=b"web",
        request_id=request_id,
        client="key:0123456789abcdef and more",
        model=model,
        job=Job(id=request_id, task="Base", text="a secret"),
        sink=PeerSink(request_id, lambda _message, _payload: None, credit),
        keep_alive_s=None,
        arrived=clock(),
    )


def _snapshot(reporter: Stats, **changes: Any) -> Snapshot:
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
    return reporter.snapshot(**{**given, **changes})


def _figures(reporter: Stats, model: str = "m") -> ModelFigures:
    return _snapshot(reporter).figures[model]


def _bucket(histogram: Histogram, bounds: tuple[float, ...]) -> float:
    """The bound up to which the one value of a histogram lies."""
    assert len(histogram.counts) == len(bounds) + 1
    assert sum(histogram.counts) == 1
    return [*bounds, float("inf")][histogram.counts.index(1)]


class TestRequests:
    """Which way they went, and how they sounded."""

    def test_counters(self, reporter: Stats) -> None:
        """Each outcome is counted for itself."""
        for outcome in ("started", "started", "started", "finished", "failed", "cancelled", "cancelled", "rejected"):
            reporter.count(outcome)
        assert _snapshot(reporter).requests == Counters(started=3, finished=1, failed=1, cancelled=2, rejected=1)

    def test_first_audio(self, reporter: Stats, clock: FakeClock) -> None:
        """The time to first audio counts from the arrival, the wait for a slot included."""
        request = _request(clock)
        clock.advance(0.4)
        reporter.began(request)
        told = _figures(reporter).first_audio_s
        assert told.sum == pytest.approx(0.4)
        assert _bucket(told, FIRST_AUDIO_BOUNDS_S) == 0.5

    def test_on_a_bound(self, reporter: Stats, clock: FakeClock) -> None:
        """A value that is a bound lies in the bucket that ends there, as Prometheus' `le` says."""
        request = _request(clock)
        clock.advance(2.0)
        reporter.began(request)
        assert _bucket(_figures(reporter).first_audio_s, FIRST_AUDIO_BOUNDS_S) == 2.0

    def test_spoken_in_time(self, reporter: Stats, clock: FakeClock) -> None:
        """The real-time factor is synthesis by audio, from admission on; a stream without a gap is no underrun."""
        request = _request(clock)
        clock.advance(7)
        request.admitted = clock()
        for _ in range(4):
            clock.advance(0.25)
            request.hand_on(bytes(bytes_for(1.0)), clock())
        reporter.spoken(request)
        figures = _figures(reporter)
        assert figures.real_time_factor.sum == pytest.approx(0.25)
        assert _bucket(figures.real_time_factor, REAL_TIME_FACTOR_BOUNDS) == 0.3
        assert _bucket(figures.underrun_s, UNDERRUN_BOUNDS_S) == 0.0

    def test_spoken_too_slowly(self, reporter: Stats, clock: FakeClock) -> None:
        """A stream whose player ran dry is an underrun, of as many seconds in all."""
        request = _request(clock)
        request.admitted = clock()
        for _ in range(3):
            clock.advance(1.2)
            request.hand_on(bytes(bytes_for(1.0)), clock())
        reporter.spoken(request)
        figures = _figures(reporter)
        assert figures.real_time_factor.sum == pytest.approx(1.2)
        assert figures.underrun_s.sum == pytest.approx(0.4)
        assert _bucket(figures.underrun_s, UNDERRUN_BOUNDS_S) == 0.5

    def test_reader_that_is_late(self, reporter: Stats, clock: FakeClock) -> None:
        """What its reader held up is neither an underrun nor slow synthesis."""
        request = _request(clock, credit=1)
        assert isinstance(request.sink, PeerSink)
        request.admitted = clock()
        clock.advance(0.5)
        request.hand_on(bytes(bytes_for(1.0)), clock())
        clock.advance(100)
        request.sink.grant(5)
        request.playback.go_on(clock())
        clock.advance(0.5)
        request.hand_on(bytes(bytes_for(1.0)), clock())
        reporter.spoken(request)
        figures = _figures(reporter)
        assert figures.real_time_factor.sum == pytest.approx(0.5)
        assert _bucket(figures.underrun_s, UNDERRUN_BOUNDS_S) == 0.0

    def test_nothing_said(self, reporter: Stats, clock: FakeClock) -> None:
        """A stream without sound has no real-time factor."""
        request = _request(clock)
        request.admitted = clock()
        reporter.spoken(request)
        assert _figures(reporter).real_time_factor == Histogram()

    def test_models_apart(self, reporter: Stats, clock: FakeClock) -> None:
        """Each model has figures of its own; one that did nothing has none."""
        reporter.began(_request(clock, model="m"))
        reporter.began(_request(clock, model="n"))
        assert _snapshot(reporter).figures.keys() == {"m", "n"}


class TestModels:
    """Where they were taken, and what went wrong."""

    @pytest.mark.parametrize("kind", ["load", "restore", "offload", "drop"])
    def test_moved(self, reporter: Stats, kind: TransitionKind) -> None:
        """Each kind of move is counted for itself, with its seconds."""
        for seconds in (0.2, 40.0):
            reporter.moved(
                TransitionDone(
                    transition=Transition("m", kind),
                    engine=None,
                    memory=Memory(),
                    before_bytes=0,
                    after_bytes=0,
                    seconds=seconds,
                )
            )
        figures = _figures(reporter)
        assert figures.moves_s.keys() == {kind}
        assert (sum(figures.moves_s[kind].counts), figures.moves_s[kind].sum) == (2, pytest.approx(40.2))
        assert len(figures.moves_s[kind].counts) == len(MOVE_BOUNDS_S) + 1
        assert (figures.failed_moves, figures.out_of_memory) == ({}, 0)

    @pytest.mark.parametrize(("code", "short"), [("model_unavailable", 0), ("insufficient_vram", 1)])
    def test_failed(self, reporter: Stats, code: str, short: int) -> None:
        """A failed move is no move; whether memory was the reason is known."""
        move = Transition("m", "load")
        reporter.moved(TransitionFailed(transition=move, error=JobError(code, "it broke"), state=ModelState.ABSENT))
        assert _figures(reporter) == ModelFigures(failed_moves={"load": 1}, out_of_memory=short)

    def test_out_of_memory(self, reporter: Stats) -> None:
        """Every time counts."""
        reporter.ran_out_of_memory("m")
        reporter.ran_out_of_memory("m")
        assert _figures(reporter).out_of_memory == 2


class TestStreams:
    """What is told of the requests that are open."""

    def test_states(self, reporter: Stats, clock: FakeClock) -> None:
        """Those with a slot come first; nothing of what they say is told, nor more of a client than its beginning."""
        waiting, speaking, stalled = (_request(clock, name, credit=1) for name in ("a", "b", "c"))
        clock.advance(2)
        for request in (speaking, stalled):
            request.admitted = clock()
        stalled.hand_on(bytes(bytes_for(0.5)), clock())
        streams = _snapshot(reporter, requests=[waiting, speaking, stalled]).streams
        assert streams == [
            StreamState(id=name, model="m", client="key:0123456789abcdef", state=state, age_s=2.0, audio_s=audio_s)
            for name, state, audio_s in (("b", "speaking", 0.0), ("c", "stalled", 0.5), ("a", "waiting", 0.0))
        ]
        assert b"secret" not in msgspec.msgpack.encode(streams)

    def test_bounded(self, reporter: Stats, clock: FakeClock) -> None:
        """However many there are, a snapshot stays small enough to be sent all the time."""
        requests = [_request(clock, f"{number:032x}.{number:08x}") for number in range(1_000)]
        snapshot = _snapshot(reporter, requests=requests)
        assert [stream.id for stream in snapshot.streams] == [request.id for request in requests[:MOST_STREAMS]]
        assert len(msgspec.msgpack.encode(snapshot)) < 10_000


class TestSnapshot:
    """All of it together."""

    def test_what_is_passed_on(self, reporter: Stats, clock: FakeClock) -> None:
        """The snapshot says who this is and what it was given."""
        clock.advance(12.5)
        snapshot = _snapshot(reporter, accepting=False)
        assert (snapshot.pid, snapshot.boot_id, snapshot.default_model) == (os.getpid(), "b", "m")
        assert (snapshot.accepting, snapshot.running, snapshot.queued, snapshot.slots) == (False, 1, 2, 3)
        assert (snapshot.uptime_s, snapshot.host.offloaded_bytes, snapshot.shared_bytes) == (12.5, 7, {"codec": 3})
        assert snapshot.restarts == 3
        assert reporter.settings == {"idle_timeout": 5.0, "default_model": "m"}

    def test_later_figures_do_not_reach_it(self, reporter: Stats, clock: FakeClock) -> None:
        """A snapshot stays as it was taken."""
        reporter.began(_request(clock))
        first = _snapshot(reporter)
        before = msgspec.msgpack.encode(first)
        reporter.began(_request(clock))
        assert msgspec.msgpack.encode(first) == before

    def test_memory_is_read_now_and_then(self) -> None:
        """Many pings cost the driver and the system one reading; what they say is never older than that."""
        clock, device = FakeClock(), FakeDevice()
        reporter = _reporter(device, clock)
        assert _snapshot(reporter).device.ours_bytes == 0
        before = _snapshot(reporter).host
        device.on_device["m"] = device.on_host["n"] = 100
        clock.advance(READING_S / 2)
        snapshot = _snapshot(reporter)
        assert (snapshot.device.ours_bytes, snapshot.host) == (0, before)
        clock.advance(READING_S / 2)
        snapshot = _snapshot(reporter)
        assert snapshot.device.ours_bytes == 100
        assert snapshot.host != before
