"""Cancelled requests, and web workers that are gone."""

from gpu_worker.transport import PeerGone
from shared.protocol import (
    Counters,
)
from tests.gpu_worker.worker_bench import OTHER, WEB, MakeBench, WorkerBench, loaded


class TestCancel:
    """Cancel, in every state of a request, and PeerGone."""

    def test_running(self, make_bench: MakeBench) -> None:
        """The slot is free before the next step; another request gets it in the same turn."""
        bench = loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x y")
        bench.turn()
        bench.cancel("r")
        bench.turn()
        assert bench.words("r") == "a"
        assert bench.words("s") == "x"
        assert bench.engines["m"].jobs == {"x y"}
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.snapshot().requests == Counters(started=3, finished=2, cancelled=1)

    def test_estimate(self, make_bench: MakeBench) -> None:
        """A cancelled request, which held its slot too short, does not shorten the estimate of a full queue."""
        bench = loaded(make_bench(slots=1, max_queue=1))
        for name in ("r", "s", "t"):
            bench.speak(name, "a b c")
        bench.turn()
        before_s = bench.last_message("t").retry_after_s
        bench.clock.advance(100)
        bench.cancel("r")
        bench.turn()
        for name in ("u", "v"):
            bench.speak(name, "a b c")
        bench.turn()
        assert bench.last_message("v").retry_after_s == before_s

    def test_queued(self, make_bench: MakeBench) -> None:
        """A cancelled queued request never starts and gets no message."""
        bench = loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x y")
        bench.turn()
        bench.cancel("s")
        bench.settle()
        assert bench.kinds("s") == []
        assert bench.snapshot().queued == 0
        assert bench.references() == {"m": 0}

    def test_waiting_for_a_model(self, bench: WorkerBench) -> None:
        """A request cancelled during the load of its model: the model arrives, and no job is admitted."""
        bench.load_gate.clear()
        bench.speak("r", "a")
        bench.turn(2)
        bench.cancel("r")
        bench.turn(2)
        bench.load_gate.set()
        bench.settle()
        assert bench.kinds("r") == []
        assert bench.engines["m"].admitted == []
        assert bench.references() == {"m": 0}

    def test_idempotent(self, bench: WorkerBench) -> None:
        """A second cancel, a late one and one for an unknown id have no effect and get no answer."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        for name in ("r", "r", "unknown"):
            bench.cancel(name)
        bench.settle()
        bench.speak("s", "x")
        bench.settle()
        bench.cancel("s")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio"]
        assert bench.kinds("s") == ["Started", "Audio", "Finished"]
        assert bench.snapshot().requests == Counters(started=3, finished=2, cancelled=1)

    def test_request_of_another_web_worker(self, bench: WorkerBench) -> None:
        """A web worker cancels only its own request, not another one with the same id."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.cancel("r", peer=OTHER)
        bench.settle()
        assert bench.kinds("r")[-1] == "Finished"

    def test_peer_gone(self, make_bench: MakeBench) -> None:
        """PeerGone ends all queued and running requests of that web worker and of no other."""
        bench = loaded(make_bench(slots=2))
        bench.speak("r1", "a b c")
        bench.speak("r2", "a b c", credit=0)
        bench.speak("r3", "a b c")
        bench.speak("s", "x y z", peer=OTHER)
        bench.turn()
        bench.inbox.put(PeerGone(WEB))
        bench.turn()
        assert bench.engines["m"].jobs == {"x y z"}
        bench.settle()
        assert bench.words("s", OTHER) == "x y z"
        snapshot = bench.snapshot()
        assert (snapshot.running, snapshot.queued) == (0, 0)
        assert snapshot.requests == Counters(started=4, finished=2, cancelled=3)
        assert bench.references() == {"m": 0}
        bench.inbox.put(PeerGone(WEB))
        bench.settle()
