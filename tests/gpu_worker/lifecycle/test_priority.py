"""Batch requests and deadlines in the loop."""

import pytest

from gpu_worker.requests.request import BATCH_PATIENCE_S
from shared.protocol import Counters
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded

LONG = " ".join(f"w{number}" for number in range(1_000))
STEP_S = 0.1


@pytest.fixture
def bench(make_bench: MakeBench) -> WorkerBench:
    """A worker with two slots, whose steps take STEP_S."""
    bench = loaded(make_bench(slots=2))
    bench.engines["m"].step_s = STEP_S
    return bench


def say_batch(bench: WorkerBench, *names: str) -> None:
    """Send long batch requests."""
    for name in names:
        bench.speak(name, LONG, client="robot", priority="batch")


def test_batch_delays_a_first_audio_by_one_step(bench: WorkerBench) -> None:
    """All slots are full of batch requests, and more wait: a listener's first audio comes with the next step."""
    say_batch(bench, "b0", "b1", "b2", "b3")
    bench.turn()
    assert bench.engines["m"].jobs == {LONG}
    assert "Audio" in bench.kinds("b0")
    for number in range(5):
        name, before = f"a{number}", bench.clock.now
        bench.speak(name, "hello")
        bench.turn()
        assert bench.kinds(name)[:2] == ["Started", "Audio"]
        assert bench.clock.now - before <= STEP_S * 1.001


def test_its_frames_are_not_lost(bench: WorkerBench) -> None:
    """A batch request that was parked for listeners says every word once, in order, in the end."""
    bench.speak("b", " ".join(f"w{number}" for number in range(50)), client="robot", priority="batch")
    bench.turn()
    for number in range(20):
        bench.speak(f"a{number}", "one two three", client=f"c{number % 3}")
        bench.turn()
    bench.settle()
    assert bench.words("b") == " ".join(f"w{number}" for number in range(50))


@pytest.mark.slow
def test_it_is_not_starved(make_bench: MakeBench) -> None:
    """Listeners come without a pause: a batch request speaks after BATCH_PATIENCE_S, and goes on then."""
    bench = loaded(make_bench(slots=1))
    bench.engines["m"].step_s = STEP_S
    say_batch(bench, "b")
    began = bench.clock.now
    number = 0
    while bench.clock.now < began + BATCH_PATIENCE_S - 1:
        bench.speak(f"a{number}", "one two three")
        number += 1
        bench.turn()
    assert bench.kinds("b").count("Audio") <= 1
    while bench.clock.now < began + 3 * BATCH_PATIENCE_S:
        bench.speak(f"a{number}", "one two three")
        number += 1
        bench.turn()
    assert bench.kinds("b").count("Audio") > 5


def test_it_does_not_come_back_for_nothing(make_bench: MakeBench) -> None:
    """While listeners want every slot, it stays parked."""
    bench = loaded(make_bench(slots=1))
    bench.engines["m"].step_s = STEP_S
    say_batch(bench, "b")
    bench.turn()
    unparked = bench.jobs_of("unpark")
    for number in range(50):
        bench.speak(f"a{number}", "one two three", client=f"c{number % 3}")
        bench.turn()
    assert unparked == []
    bench.settle()
    assert bench.words("b") == LONG


class TestDeadline:
    """A request whose audio would begin too late."""

    def test_in_the_queue(self, make_bench: MakeBench) -> None:
        """It fails when its time is over, and frees its place."""
        bench = loaded(make_bench(slots=1, max_queue=1))
        bench.engines["m"].step_s = STEP_S
        bench.speak("a", LONG)
        bench.turn()
        bench.speak("b", "hello", deadline_s=1.0)
        for _ in range(5):
            bench.turn()
        assert bench.kinds("b") == []
        for _ in range(10):
            bench.turn()
        (failed,) = bench.messages("b")
        assert (failed.code, failed.message) == ("deadline_exceeded", "no audio could be made within 1 s")
        bench.speak("c", "hello")
        assert bench.snapshot().requests == Counters(started=2, finished=1, failed=1)

    def test_in_a_slot(self, bench: WorkerBench) -> None:
        """It may have a slot and no audio yet."""
        bench.engines["m"].muted.add("slow")
        bench.speak("b", "slow", deadline_s=0.5)
        bench.turn()
        assert bench.kinds("b") == ["Started"]
        bench.clock.advance(0.6)
        bench.turn()
        assert bench.messages("b")[-1].code == "deadline_exceeded"

    def test_in_the_step_of_its_first_audio(self, make_bench: MakeBench) -> None:
        """Audio that a step makes too late is not sent."""
        bench = loaded(make_bench())
        bench.engines["m"].step_s = STEP_S
        bench.speak("b", "hello", deadline_s=STEP_S / 2)
        bench.settle()
        assert bench.kinds("b") == ["Started", "Failed"]
        assert bench.messages("b")[-1].code == "deadline_exceeded"

    def test_after_its_first_audio(self, bench: WorkerBench) -> None:
        """Speech that has begun in time is finished."""
        bench.speak("b", "one two three four five six", deadline_s=0.15)
        bench.settle()
        assert bench.words("b") == "one two three four five six"
