"""Counters, histograms and the snapshot."""

import os
from typing import Any

import msgspec
import pytest

from gpu_worker.caches import Caches
from gpu_worker.engines.base import Done, EngineStats, JobError, Memory
from gpu_worker.requests import STALLED_AFTER_S, Request
from gpu_worker.requests.audio_buffer import AudioBuffer
from gpu_worker.residency.models import ModelState, Transition, TransitionDone, TransitionFailed, TransitionKind
from gpu_worker.stats import MAX_STREAMS, MEMORY_READING_S, Ending, Stats
from shared.pcm import bytes_for
from shared.protocol import (
    BATCH_SIZE_BOUNDS,
    FIRST_AUDIO_BOUNDS_S,
    REAL_TIME_FACTOR_BOUNDS,
    TRANSITION_BOUNDS_S,
    UNDERRUN_BOUNDS_S,
    BufferMemory,
    CacheStats,
    Counters,
    Histogram,
    ModelStats,
    Snapshot,
    StreamState,
    Usage,
)
from tests.gpu_worker.fakes import FakeClock, FakeDevice, a_request, a_sink

WALL_S = 1_700_000_000.5
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
        wall_clock=lambda: WALL_S,
    )


@pytest.fixture
def clock() -> FakeClock:
    """The worker's clock."""
    return FakeClock()


@pytest.fixture
def stats(clock: FakeClock) -> Stats:
    """The stats of a worker that has just started."""
    return _stats(FakeDevice(), clock)


class FakeVoices:
    """The recordings of saved voices: none."""

    def cache_stats(self) -> CacheStats:
        """An empty cache."""
        return CacheStats(name="recordings", entries=0, bytes=0, hits=0, misses=0)


def _request(clock: FakeClock, request_id: str = "r", *, model: str = "m", credit: int = 1_000) -> Request:
    """A request that arrives now."""
    return a_request(
        request_id,
        client="key:0123456789abcdef and more",
        model=model,
        sink=a_sink(request_id, credit=credit),
        arrived_at=clock(),
    )


def _snapshot(stats: Stats, **changes: Any) -> Snapshot:
    given: dict[str, Any] = {
        "accepting": True,
        "running": 1,
        "queued": 2,
        "slots": 3,
        "buffer": AudioBuffer(1_000),
        "models": [],
        "offloaded_bytes": 7,
        "cleanup": None,
        "voices": [],
        "requests": [],
        "caches": Caches(dict, FakeVoices()),  # type: ignore[arg-type] # it asks for the figures alone
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

    def test_counters(self, stats: Stats, clock: FakeClock) -> None:
        """Every ending has its own counter."""
        for _ in range(3):
            stats.request_started(_request(clock))
        stats.request_rejected()
        endings: list[Ending] = ["finished", "failed", "cancelled", "cancelled"]
        for ending in endings:
            stats.request_ended(ending)
        assert _snapshot(stats).requests == Counters(started=3, finished=1, failed=1, cancelled=2, rejected=1)

    def test_queue_wait(self, stats: Stats, clock: FakeClock) -> None:
        """The wait for a slot starts at the arrival."""
        request = _request(clock)
        clock.advance(0.25)
        stats.request_started(request)
        histogram = _model_stats(stats).queue_wait_s
        assert histogram.sum == pytest.approx(0.25)
        assert _bucket(histogram, FIRST_AUDIO_BOUNDS_S) == 0.3

    def test_audio(self, stats: Stats) -> None:
        """The audio of each model is counted in seconds."""
        stats.audio_made("m", bytes_for(0.5))
        stats.audio_made("m", bytes_for(0.25))
        stats.audio_made("n", bytes_for(1.0))
        model_stats = _snapshot(stats).model_stats
        assert {model: figures.audio_s for model, figures in model_stats.items()} == {"m": 0.75, "n": 1.0}

    def test_limit_hits(self, stats: Stats) -> None:
        """Refusals are counted by the limit that they are for; others are not."""
        for limit in ("queue", "characters_per_day", "queue", None):
            stats.limit_hit(limit)  # type: ignore[arg-type] # mypy takes the names for any strings
        assert _snapshot(stats).limit_hits == {"queue": 2, "characters_per_day": 1}

    def test_exemplars(self, stats: Stats, clock: FakeClock) -> None:
        """Each bucket of the time to first audio knows its latest request by its speech id."""
        for wait_s, speech_id in ((0.25, "aa"), (0.01, "bb"), (0.25, "cc")):
            request = a_request(f"my.request.{speech_id}", arrived_at=clock())
            clock.advance(wait_s)
            stats.first_audio(request)
        exemplars = _model_stats(stats).first_audio_s.exemplars
        found = {bucket: (round(one.value, 6), one.speech_id) for bucket, one in exemplars.items()}
        assert found == {0: (0.01, "bb"), FIRST_AUDIO_BOUNDS_S.index(0.3): (0.25, "cc")}
        assert {one.at for one in exemplars.values()} == {WALL_S}

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
        stats.speech_made(request)
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
        stats.speech_made(request)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(1.2)
        assert model_stats.underrun_s.sum == pytest.approx(0.4)
        assert _bucket(model_stats.underrun_s, UNDERRUN_BOUNDS_S) == 0.5

    def test_slow_reader(self, stats: Stats, clock: FakeClock) -> None:
        """A pause of the reader is no underrun."""
        request = _request(clock, credit=1)
        request.start(clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        clock.advance(100)
        request.grant(5, clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        stats.speech_made(request)
        assert _bucket(_model_stats(stats).underrun_s, UNDERRUN_BOUNDS_S) == 0.0

    def test_ahead_of_the_reader(self, stats: Stats, clock: FakeClock) -> None:
        """Audio that waits for its reader was made in time, and counts in the real-time factor at once."""
        request = _request(clock, credit=1)
        request.start(clock())
        for _ in range(4):
            clock.advance(0.25)
            request.push(bytes(bytes_for(1.0)), clock())
        clock.advance(50)
        request.grant(1, clock())
        stats.speech_made(request)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(51 / 4)
        assert model_stats.underrun_s.sum == 0.0

    def test_parked_and_held_back(self, stats: Stats, clock: FakeClock) -> None:
        """The time for which a request is parked or held back is no synthesis. A player that runs dry in it waits."""
        request = _request(clock)
        request.start(clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        request.park(10, clock())
        clock.advance(3)
        request.unpark(clock())
        clock.advance(0.5)
        request.push(bytes(bytes_for(1.0)), clock())
        request.set_idle(idle=True, now=clock())
        clock.advance(0.5)
        stats.speech_made(request)
        model_stats = _model_stats(stats)
        assert model_stats.real_time_factor.sum == pytest.approx(0.5)
        assert model_stats.underrun_s.sum == pytest.approx(2.5)

    def test_no_audio(self, stats: Stats, clock: FakeClock) -> None:
        """A stream without audio has no real-time factor."""
        request = _request(clock)
        request.start(clock())
        stats.speech_made(request)
        assert _model_stats(stats).real_time_factor == Histogram()

    def test_models_apart(self, stats: Stats, clock: FakeClock) -> None:
        """Every model has its own figures; a model that did nothing has none."""
        stats.first_audio(_request(clock, model="m"))
        stats.first_audio(_request(clock, model="n"))
        assert _snapshot(stats).model_stats.keys() == {"m", "n"}


class TestEngines:
    """The counters of engines in the figures."""

    def test_batches(self, stats: Stats) -> None:
        """Each batch counts once, however often the engine is asked; the steps are told apart."""
        for _ in range(2):
            stats.engine_stats("m", EngineStats(batch_sizes={1: 3, 4: 1}, captured_steps=3, eager_steps=1))
        stats.engine_stats("m", EngineStats(batch_sizes={1: 4, 4: 1, 200: 2}, captured_steps=6, eager_steps=1))
        model_stats = _model_stats(stats)
        assert model_stats.batch_size == Histogram(counts=[4, 0, 1, 0, 0, 0, 0, 0, 2], sum=408.0)
        assert len(model_stats.batch_size.counts) == len(BATCH_SIZE_BOUNDS) + 1
        assert (model_stats.captured_steps, model_stats.eager_steps) == (6, 1)
        assert _snapshot(stats).performance["m"][0].batch_size.count == 7

    def test_loaded_again(self, stats: Stats) -> None:
        """A new engine begins at 0, and what the old one counted stays."""
        stats.engine_stats("m", EngineStats(batch_sizes={2: 5}, captured_steps=5))
        stats.engine_stats("m", EngineStats(batch_sizes={2: 1}, eager_steps=1))
        model_stats = _model_stats(stats)
        assert (sum(model_stats.batch_size.counts), model_stats.captured_steps, model_stats.eager_steps) == (6, 5, 1)


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
        """Requests with a slot come first, queued ones last. Texts are not shown, and of a client a few characters."""
        names = ("waiting", "draining", "parked", "stalled", "generating")
        waiting, draining, parked, stalled, generating = (_request(clock, name, credit=1) for name in names)
        for request in (draining, parked, stalled, generating):
            request.start(clock())
        for request in (stalled, draining, draining):
            request.push(bytes(bytes_for(0.5)), clock())
        draining.end(DONE, clock())
        parked.park(10, clock())
        clock.advance(STALLED_AFTER_S)
        draining.grant(0, clock())
        clock.advance(2.0)
        snapshot = _snapshot(stats, requests=[waiting, draining, parked, stalled, generating])
        assert snapshot.streams == [
            StreamState(
                id=name,
                model="m",
                client="key:0123456789abcdef",
                state=state,
                age_s=STALLED_AFTER_S + 2.0,
                audio_s=audio_s,
                buffered_s=buffered_s,
            )
            for name, state, audio_s, buffered_s in (
                ("stalled", "stalled", 0.5, 0.0),
                ("generating", "generating", 0.0, 0.0),
                ("draining", "buffered", 1.0, 0.5),
                ("parked", "buffered", 0.0, 0.0),
                ("waiting", "waiting", 0.0, 0.0),
            )
        ]
        assert (snapshot.buffered, snapshot.stalled) == (2, 1)
        assert b"secret" not in msgspec.msgpack.encode(snapshot.streams)

    def test_buffer(self, stats: Stats) -> None:
        """The bytes of the buffer, and its budget."""
        buffer = AudioBuffer(1_000)
        buffer.add(70)
        assert _snapshot(stats, buffer=buffer).audio_buffer == BufferMemory(used_bytes=70, budget_bytes=1_000)

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
