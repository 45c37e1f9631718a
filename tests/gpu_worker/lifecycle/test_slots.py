"""Slots: generation ahead of the readers, parked requests, and the buffer's budget."""

import pytest

from gpu_worker.engines.base import Done, Event, Pcm
from gpu_worker.requests import STALLED_AFTER_S, RequestState
from gpu_worker.requests.audio_buffer import FLOOR_BYTES
from gpu_worker.scheduling.slot_policy import HUNGRY_BELOW_S, MIN_IN_HAND_S, RETURN_MARGIN_S
from gpu_worker.transport import PeerGone
from gpu_worker.worker import Drain
from shared.pcm import bytes_for
from shared.protocol import Counters, Started, Usage
from tests.gpu_worker.fakes import FakeClock
from tests.gpu_worker.worker_bench import WEB, MakeBench, WorkerBench, loaded

LONG = " ".join(f"w{number}" for number in range(200))
"""A text of 200 words, a second each in these tests."""

TURN_S = 0.3
"""The duration of a turn: longer than the shortest slice, and less than a word lasts."""


def _bench(make_bench: MakeBench, **options: object) -> WorkerBench:
    """A worker with one slot, whose engine says a word of a second in each turn."""
    bench = loaded(make_bench(**{"slots": 1, **options}))
    bench.engines["m"].word_s = 1.0
    return bench


def _turn(bench: WorkerBench, times: int = 1) -> None:
    for _ in range(times):
        bench.clock.advance(TURN_S)
        bench.turn()


def _state(bench: WorkerBench, name: str) -> RequestState:
    return next(request.state for request in bench.scheduler.submitted if request.id == name)


class TestParking:
    """Who gives a slot to whom."""

    def test_newcomer(self, make_bench: MakeBench) -> None:
        """A newcomer speaks at once in the slot of a request that is ahead; that one goes on and loses no word."""
        bench = _bench(make_bench)
        bench.speak("long", LONG)
        _turn(bench, 10)
        bench.speak("short", "x y")
        _turn(bench)
        assert bench.words("short") == "x"
        assert _state(bench, "long") is RequestState.PARKED
        assert bench.references() == {"m": 2}
        assert bench.snapshot().buffered == 1
        bench.settle()
        assert bench.kinds("short")[-1] == bench.kinds("long")[-1] == "Finished"
        assert bench.words("long") == LONG
        assert bench.buffer.used_bytes == 0

    def test_the_one_that_is_ahead_most(self, make_bench: MakeBench) -> None:
        """The request with the most audio in hand is parked, whether its reader takes it or not."""
        bench = _bench(make_bench, slots=2)
        bench.speak("stalled", LONG, credit=1)
        _turn(bench, 6)
        bench.speak("reading", LONG)
        _turn(bench, 6)
        bench.speak("short", "x")
        _turn(bench)
        assert _state(bench, "stalled") is RequestState.PARKED
        assert _state(bench, "reading") is RequestState.RUNNING

    def test_little_in_hand(self, make_bench: MakeBench) -> None:
        """A request is not parked before it has some audio in hand, so it is not parked at all by a slow engine."""
        bench = _bench(make_bench)
        bench.engines["m"].word_s = TURN_S  # just as long as the turn
        bench.speak("long", LONG)
        bench.speak("short", "x")
        _turn(bench, 20)
        assert bench.kinds("short") == []
        bench.engines["m"].word_s = 1.0
        turns = int(MIN_IN_HAND_S / (1.0 - TURN_S)) + 2
        _turn(bench, turns)
        assert bench.words("short") == "x"

    def test_all_are_heard_late(self, make_bench: MakeBench) -> None:
        """If a parked request has run dry, a newcomer speaks at once, and the others go on after it."""
        bench = _bench(make_bench)
        bench.speak("first", LONG)
        _turn(bench, 10)
        bench.speak("second", LONG)
        _turn(bench)
        assert _state(bench, "first") is RequestState.PARKED
        bench.engines["m"].word_s = TURN_S + 0.01  # the device no longer keeps up with two
        bench.clock.advance(9)
        _turn(bench, 3)
        bench.speak("short", "x")
        _turn(bench)
        assert bench.words("short") == "x"
        bench.settle()
        assert bench.words("first") == bench.words("second") == LONG

    @pytest.mark.parametrize("ms", range(20))
    def test_time_passes_meanwhile(self, make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, ms: int) -> None:
        """A newcomer whose slot is no longer to be had when it should start stays in the queue."""
        bench = _bench(make_bench)
        bench.speak("long", LONG)
        _turn(bench, 4)
        (long,) = bench.worker._slots.running.values()
        bench.clock.advance(long.in_hand_s(bench.clock()) - MIN_IN_HAND_S - ms / 1_000)
        read = FakeClock.__call__

        def slow(clock: FakeClock) -> float:
            clock.advance(0.001)
            return read(clock)

        monkeypatch.setattr(FakeClock, "__call__", slow)
        bench.speak("short", "x")
        bench.settle()
        assert bench.kinds("short")[-1] == "Finished"

    def test_hungry(self, make_bench: MakeBench) -> None:
        """A parked request is back in a slot before its listener has heard everything."""
        bench = _bench(make_bench)
        bench.speak("first", LONG)
        _turn(bench, 12)
        bench.speak("second", LONG)
        _turn(bench)
        (first,) = bench.worker._slots.parked.values()
        in_hand_s = []
        for _ in range(200):
            _turn(bench)
            parked = list(bench.worker._slots.parked.values())
            if parked:
                in_hand_s.append(parked[0].in_hand_s(bench.clock()))
        assert min(in_hand_s) > HUNGRY_BELOW_S - 2 * TURN_S
        assert first.playback.underrun_s == 0.0
        bench.settle()
        assert bench.words("first") == bench.words("second") == LONG

    def test_swaps_are_rare(self, make_bench: MakeBench) -> None:
        """Two requests that share a slot on a device that is fast enough swap once in several seconds of audio."""
        bench = _bench(make_bench)
        parks = bench.jobs_of("park")
        bench.speak("first", LONG)
        bench.speak("second", LONG)
        _turn(bench, 2 * 200 + 10)
        assert bench.words("first") == bench.words("second") == LONG
        assert 0 < len(parks) <= 2 * 200 / RETURN_MARGIN_S

    def test_newcomers_and_hungry_ones_take_turns(self, make_bench: MakeBench) -> None:
        """However many newcomers wait, a parked request that runs dry gets its turn; and they get theirs."""
        bench = _bench(make_bench, max_queue=1_000)
        bench.speak("long", LONG)
        _turn(bench, 10)
        for number in range(150):
            bench.speak(f"short{number}", "x y z", client=f"client {number}")
        _turn(bench, 20)
        bench.clock.advance(20)
        before = len(bench.words("long").split())
        _turn(bench, 80)
        assert bench.snapshot().queued > 10
        assert len(bench.words("long").split()) > before
        started = [message.id for _, message, _ in bench.sent if isinstance(message, Started)]
        assert len(started) > 30

    def test_free_slot(self, make_bench: MakeBench) -> None:
        """A free slot is used: by the parked request with the least in hand, however much that is."""
        bench = _bench(make_bench)
        bench.speak("long", LONG, credit=2)
        _turn(bench, 90)
        bench.speak("short", "x")
        _turn(bench, 3)
        assert bench.words("short") == "x"
        assert _state(bench, "long") is RequestState.RUNNING

    def test_max_concurrency(self, make_bench: MakeBench) -> None:
        """If only TTS_MAX_CONCURRENCY is used up, a request of another model is parked."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=4, max_concurrency=1), "m", "n")
        bench.engines["m"].word_s = 1.0
        bench.speak("long", LONG)
        _turn(bench, 10)
        bench.speak("other", "x", model="n")
        _turn(bench)
        assert bench.words("other") == "x"

    def test_slots_of_another_model(self, make_bench: MakeBench) -> None:
        """A request of another model is not parked where that frees no slot."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.engines["m"].word_s = bench.engines["n"].word_s = 1.0
        bench.speak("m1", LONG)
        _turn(bench, 10)
        bench.engines["n"].muted.add("mute")
        bench.speak("n1", "mute", model="n")
        bench.speak("n2", "x", model="n")
        _turn(bench, 5)
        assert _state(bench, "m1") is RequestState.RUNNING
        assert bench.kinds("n2") == []


class TestFirstAudio:
    """Steps that are left to newcomers."""

    def test_alone(self, make_bench: MakeBench) -> None:
        """A newcomer's first step is its own; the others are in the next one, however many newcomers come."""
        bench = _bench(make_bench, slots=3)
        engine = bench.engines["m"]
        bench.speak("long", LONG)
        bench.turn()
        for number in range(8):
            bench.speak(f"short{number}", "x y z")
            engine.batch_sizes.clear()
            bench.turn()
            assert bench.words(f"short{number}") == "x"
            assert engine.batch_sizes == {1: 1}
            bench.turn()
            assert engine.batch_sizes[2] == 1
            bench.cancel(f"short{number}")
        assert len(bench.words("long").split()) == 9

    def test_nobody_runs_dry(self, make_bench: MakeBench) -> None:
        """A listener hears no gap, though a newcomer comes in every turn."""
        bench = _bench(make_bench, slots=2)
        bench.speak("long", LONG)
        _turn(bench, 5)
        (long,) = bench.worker._slots.running.values()
        for number in range(300):
            bench.speak(f"short{number}", "x")
            _turn(bench)
        assert long.playback.underrun_s == 0.0
        bench.settle()
        assert bench.words("long") == LONG

    def test_only_where_it_helps(self, make_bench: MakeBench) -> None:
        """Neither a newcomer that cannot speak yet nor one on a device that is no faster for it has others wait."""
        bench = _bench(make_bench, slots=2)
        engine = bench.engines["m"]
        engine.muted.add("mute")
        bench.speak("long", LONG)
        _turn(bench, 10)
        bench.speak("mute", "mute")
        _turn(bench, 5)
        assert len(bench.words("long").split()) == 15
        bench.cancel("mute")
        engine.is_faster_alone = lambda: False  # type: ignore[method-assign] # a GPU
        bench.speak("short", "x")
        _turn(bench)
        assert bench.words("short") == "x"
        assert len(bench.words("long").split()) == 16


class TestEnds:
    """A parked request that ends."""

    def _parked(self, bench: WorkerBench) -> None:
        bench.speak("long", LONG, credit=2)
        _turn(bench, 10)
        bench.engines["m"].muted.add("x")
        bench.speak("short", "x")
        _turn(bench)
        assert _state(bench, "long") is RequestState.PARKED
        assert bench.buffer.used_bytes > 0

    def test_cancelled(self, make_bench: MakeBench) -> None:
        """A cancelled parked request leaves its engine, its model and the buffer."""
        bench = _bench(make_bench)
        self._parked(bench)
        bench.cancel("long")
        _turn(bench)
        assert bench.engines["m"].parked == set()
        assert bench.references() == {"m": 1}
        assert bench.buffer.used_bytes == 0
        assert bench.snapshot().requests == Counters(started=3, finished=1, cancelled=1)

    def test_web_worker_gone(self, make_bench: MakeBench) -> None:
        """The same if its web worker is gone."""
        bench = _bench(make_bench)
        self._parked(bench)
        bench.inbox.put(PeerGone(WEB))
        _turn(bench)
        assert (bench.engines["m"].parked, bench.buffer.used_bytes) == (set(), 0)

    def test_never_read(self, make_bench: MakeBench) -> None:
        """The stall timeout fails it."""
        bench = _bench(make_bench, stall_timeout_s=30)
        self._parked(bench)
        bench.clock.advance(31)
        _turn(bench)
        assert bench.last_message("long").code == "client_too_slow"
        assert bench.engines["m"].parked == set()

    def test_engine_fails(self, make_bench: MakeBench) -> None:
        """A parked request fails with its engine."""
        bench = _bench(make_bench)
        self._parked(bench)
        bench.engines["m"].muted.clear()
        bench.engines["m"].step_errors.append(ValueError("lost my place"))
        _turn(bench)
        assert bench.last_message("long").code == bench.last_message("short").code == "synthesis_failed"
        assert bench.buffer.used_bytes == 0

    def test_audio_under_way(self, make_bench: MakeBench) -> None:
        """Audio, and the end, that come after a request was parked, are delivered as ever."""
        bench = _bench(make_bench)
        self._parked(bench)
        (request,) = bench.worker._slots.parked.values()
        engine = bench.engines["m"]
        step = engine.step

        def late(stalled: set[str]) -> list[Event]:
            engine.cancel(request.job.id)
            engine.step = step  # type: ignore[method-assign] # once
            usage = Usage(input_tokens=1, output_tokens=1)
            return [Pcm(request.job.id, b"late\0\0\0\0"), Done(request.job.id, "stop", usage), *step(stalled)]

        engine.step = late  # type: ignore[method-assign, assignment] # a pipeline may do that
        engine.muted.clear()
        _turn(bench)
        assert request.state is RequestState.DRAINING
        bench.credit("long", 1_000)
        bench.settle()
        assert bench.words("long").endswith(" late")
        assert bench.kinds("long")[-1] == "Finished"

    def test_drain(self, make_bench: MakeBench) -> None:
        """When the service stops, parked requests may finish, as those with a slot."""
        bench = _bench(make_bench)
        self._parked(bench)
        bench.engines["m"].muted.clear()
        bench.credit("long", 1_000)
        bench.inbox.put(Drain(30))
        bench.worker.run()
        assert bench.words("long") == LONG
        assert bench.kinds("long")[-1] == "Finished"


class TestErrors:
    """Engines that cannot park or unpark."""

    def test_no_host_ram(self, make_bench: MakeBench) -> None:
        """If the host's RAM has run out, the request keeps its slot, and the newcomer waits for a while."""
        bench = _bench(make_bench)
        bench.speak("long", LONG)
        _turn(bench, 10)
        bench.engines["m"].park_errors.append(MemoryError("full"))
        bench.speak("short", "x")
        bench.turn()
        assert (_state(bench, "long"), _state(bench, "short")) == (RequestState.RUNNING, RequestState.QUEUED)
        _turn(bench, 6)
        assert bench.words("short") == "x"
        bench.settle()
        assert bench.words("long") == LONG

    @pytest.mark.parametrize("which", ["park_errors", "unpark_errors"])
    def test_engine_breaks(self, make_bench: MakeBench, which: str) -> None:
        """Another error is that of a broken engine: its requests fail, and queued ones get a new engine."""
        bench = _bench(make_bench)
        getattr(bench.engines["m"], which).append(ValueError("lost my place"))
        bench.speak("long", LONG)
        _turn(bench, 10)
        bench.speak("short", "x")
        bench.settle()
        assert bench.last_message("long").code == "synthesis_failed"
        assert bench.words("short") == "x"
        assert len(bench.opened) == (2 if which == "park_errors" else 1)


class TestBudget:
    """The buffer's budget."""

    @pytest.mark.parametrize(("parked_bytes", "share"), [(0, 1 / 2), (10, 2 / 3)], ids=["between", "in utterance"])
    def test_held_back(self, make_bench: MakeBench, parked_bytes: int, share: float) -> None:
        """If a reader takes nothing, half of the budget is filled, or two thirds within an utterance."""
        bench = _bench(make_bench, buffer_bytes=bytes_for(60))
        bench.engines["m"].parked_bytes = parked_bytes
        bench.speak("slow", LONG, credit=1)
        bench.settle()
        waiting = bench.buffer.used_bytes
        assert bytes_for(60 * share - 3) < waiting <= bytes_for(60 * share)
        assert _state(bench, "slow") is RequestState.RUNNING
        steps = bench.engines["m"].steps
        bench.turn(5)
        assert bench.engines["m"].steps == steps
        bench.credit("slow", 10)
        bench.settle()
        assert waiting - bytes_for(2) <= bench.buffer.used_bytes <= bytes_for(60 * share)
        for _ in range(30):
            bench.credit("slow", 10)
            bench.settle()
        assert bench.words("slow") == LONG

    def test_held_back_time_is_no_synthesis(self, make_bench: MakeBench) -> None:
        """The time for which a request is held back counts neither as synthesis nor as an underrun."""
        bench = _bench(make_bench, buffer_bytes=bytes_for(60))
        bench.speak("slow", LONG, credit=1)
        bench.settle()
        bench.clock.advance(50)
        for _ in range(30):
            bench.credit("slow", 10)
            bench.settle()
        model_stats = bench.snapshot().model_stats["m"]
        assert model_stats.real_time_factor.sum == pytest.approx(0.0, abs=0.01)
        assert model_stats.underrun_s.sum == pytest.approx(0.0, abs=0.01)

    def test_shared(self, make_bench: MakeBench) -> None:
        """Requests whose readers take nothing share the budget, and leave as much for another one."""
        bench = _bench(make_bench, slots=3, buffer_bytes=bytes_for(100))
        bench.engines["m"].parked_bytes = 0
        for number in range(9):
            bench.speak(f"slow{number}", LONG, credit=0)
            _turn(bench, 40)
        assert bench.buffer.used_bytes <= bench.buffer.budget_bytes
        bench.speak("reading", "x y z")
        _turn(bench, 4)
        assert bench.words("reading") == "x y z"

    def test_no_room_to_park(self, make_bench: MakeBench) -> None:
        """A job that is too large to park is not, but the one with the most in hand of the others."""
        bench = _bench(make_bench, slots=2, buffer_bytes=bytes_for(100))
        engine = bench.engines["m"]
        bench.speak("most", LONG, credit=0)
        _turn(bench, 5)
        bench.speak("less", LONG, credit=0)
        _turn(bench, 5)
        large = next(job_id for job_id in engine.job_ids if job_id.endswith("-most"))
        engine.park_bytes = lambda job_id: bytes_for(90) if job_id == large else 10  # type: ignore[method-assign]
        bench.speak("short", "x")
        _turn(bench)
        assert bench.words("short") == "x"
        assert _state(bench, "less") is RequestState.PARKED

    def test_longest_stalled_fails(self, make_bench: MakeBench) -> None:
        """If nothing can be parked for want of room, the reader that has stalled longest makes room for a newcomer."""
        bench = _bench(make_bench, slots=2, buffer_bytes=bytes_for(100))
        bench.engines["m"].parked_bytes = bytes_for(90)
        for name in ("first", "second"):
            bench.speak(name, LONG, credit=0)
            _turn(bench, 10)
        bench.speak("short", "x")
        bench.clock.advance(STALLED_AFTER_S - 20 * TURN_S - 0.1)
        _turn(bench)
        assert bench.kinds("short") == []
        _turn(bench, 2)
        assert bench.last_message("first").code == "client_too_slow"
        assert bench.words("short") == "x"
        assert bench.kinds("second") == ["Started"]
        bench.clock.advance(1_000)
        assert bench.kinds("second") == ["Started"]

    def test_nobody_fails_without_need(self, make_bench: MakeBench) -> None:
        """Stalled readers keep their audio while nothing else waits for room."""
        bench = _bench(make_bench, slots=2, buffer_bytes=bytes_for(30), stall_timeout_s=1_000)
        for number in range(4):
            bench.speak(f"slow{number}", "a b", credit=0)
        bench.settle()
        bench.clock.advance(500)
        bench.settle()
        assert all(bench.kinds(f"slow{number}") == ["Started"] for number in range(4))

    def test_number_of_open_requests(self, make_bench: MakeBench) -> None:
        """Requests whose readers take nothing, however short they are, are so many as the budget holds, and no more."""
        bench = _bench(make_bench, slots=4, buffer_bytes=bytes_for(20), max_queue=200)
        for number in range(100):
            bench.speak(f"short{number}", "x", credit=0)
        bench.settle()
        snapshot = bench.snapshot()
        assert 0 < snapshot.buffered <= 20
        assert snapshot.queued == 100 - snapshot.buffered
        assert bench.buffer.used_bytes <= bench.buffer.budget_bytes - FLOOR_BYTES
        for _ in range(120):
            bench.clock.advance(STALLED_AFTER_S)
            bench.turn(3)
        assert bench.snapshot().queued == 0
