"""Credit: the loop never sends more audio than a web worker can take."""

from gpu_worker.worker import Drain
from shared.protocol import (
    Audio,
    Counters,
)
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class TestCredit:
    """Audio is sent only against credit."""

    def test_no_more_than_credit(self, bench: WorkerBench) -> None:
        """Audio stops when the credit is used up and goes on with the next; Finished waits behind the last piece."""
        loaded(bench)
        bench.speak("r", "a b c d e", credit=2)
        bench.settle()
        assert bench.words("r") == "a b"
        bench.credit("r", 1)
        bench.settle()
        assert bench.words("r") == "a b c"
        bench.credit("r", 10)
        bench.settle()
        assert bench.words("r") == "a b c d e"
        assert bench.kinds("r")[-2:] == ["Audio", "Finished"]
        assert bench.snapshot().running == 0

    def test_credit_for_exactly_all(self, bench: WorkerBench) -> None:
        """Finished needs no credit."""
        loaded(bench)
        bench.speak("r", "a b", credit=2)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Finished"]

    def test_speech_is_made_ahead_of_its_reader(self, make_bench: MakeBench) -> None:
        """Speech is made as fast as the engine can, whatever its reader takes: the slot and the model are free then."""
        bench = loaded(make_bench(slots=1))
        bench.speak("slow", "a b c", credit=1)
        bench.speak("fast", "x y z")
        bench.settle()
        assert (bench.words("slow"), bench.words("fast")) == ("a", "x y z")
        snapshot = bench.snapshot()
        assert (snapshot.running, snapshot.queued, snapshot.buffered) == (0, 0, 1)
        assert bench.references() == {"m": 0}
        bench.credit("slow", 3)
        bench.settle()
        assert bench.words("slow") == "a b c"

    def test_credit_without_effect(self, bench: WorkerBench) -> None:
        """Credit for an ended or unknown request is ignored; negative credit takes none away."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.credit("r", -5)
        bench.credit("unknown", 3)
        bench.credit("r", 2)
        bench.settle()
        bench.credit("r", 3)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Audio", "Finished"]

    def test_stall_timeout(self, make_bench: MakeBench) -> None:
        """A request whose reader takes nothing for stall_timeout_s fails, with a slot or without."""
        bench = loaded(make_bench(slots=1, stall_timeout_s=10))
        bench.speak("slow", "a b c", credit=1)
        bench.speak("muted", "x", credit=0)
        bench.turn(4)
        bench.engines["m"].muted.add("x")
        bench.settle()
        bench.clock.advance(9)
        bench.turn()
        assert bench.kinds("slow") == ["Started", "Audio"]
        assert bench.kinds("muted") == ["Started"]
        bench.clock.advance(2)
        bench.settle()
        assert bench.last_message("slow").code == "client_too_slow"
        assert bench.last_message("muted").code == "client_too_slow"
        assert bench.engines["m"].jobs == set()
        assert bench.references() == {"m": 0}
        assert bench.buffer.used_bytes == 0

    def test_reading_a_little_is_enough(self, make_bench: MakeBench) -> None:
        """The stall timeout starts again with every credit."""
        bench = loaded(make_bench(stall_timeout_s=10))
        bench.speak("slow", "a b c", credit=0)
        for _ in range(3):
            bench.settle()
            bench.clock.advance(9)
            bench.credit("slow", 1)
        bench.settle()
        assert bench.kinds("slow")[-1] == "Finished"

    def test_a_queued_request_is_not_stalled(self, make_bench: MakeBench) -> None:
        """The stall timeout does not run for a queued request: there is nothing to read yet."""
        bench = make_bench(stall_timeout_s=10)
        bench.load_gate.clear()
        bench.speak("r", "a", credit=0)
        bench.turn(2)
        bench.clock.advance(60)
        bench.turn(2)
        assert bench.kinds("r") == []
        bench.load_gate.set()
        bench.settle()
        bench.credit("r", 1)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Finished"]


class TestDraining:
    """A request that was said in full while its reader has not taken all of it."""

    def _draining(self, bench: WorkerBench) -> WorkerBench:
        loaded(bench)
        bench.engines["m"].words_per_step = 2
        bench.speak("r", "a b", credit=1)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.snapshot().running == 0
        return bench

    def test_finished_waits(self, bench: WorkerBench) -> None:
        """The slot is free; the last piece and Finished come with the credit."""
        self._draining(bench)
        bench.credit("r", 1)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Audio", "Finished"]
        assert [message.seq for message in bench.messages("r") if isinstance(message, Audio)] == [0, 1]

    def test_cancelled(self, bench: WorkerBench) -> None:
        """A cancel ends the request; later credit brings nothing."""
        self._draining(bench)
        bench.cancel("r")
        bench.credit("r", 5)
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.snapshot().requests == Counters(started=2, finished=1, cancelled=1)
        assert bench.references() == {"m": 0}

    def test_never_read(self, bench: WorkerBench) -> None:
        """The stall timeout fails it like a running request."""
        self._draining(bench)
        bench.clock.advance(61)
        bench.turn()
        assert bench.last_message("r").code == "client_too_slow"
        assert bench.references() == {"m": 0}

    def test_delays_the_drain(self, bench: WorkerBench) -> None:
        """The drain waits for it until its deadline, then fails it."""
        self._draining(bench)
        bench.inbox.put(Drain(5))
        bench.turn(3)
        bench.clock.advance(6)
        bench.worker.run()
        assert bench.last_message("r").code == "shutting_down"
