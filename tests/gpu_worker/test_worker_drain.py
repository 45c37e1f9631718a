"""The end of the process."""

from gpu_worker.worker import Drain
from shared.protocol import (
    Cleanup,
    LoadModel,
)
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class TestDrain:
    """From Drain to the end of `run`."""

    def test_running_requests_end_queued_ones_fail(self, make_bench: MakeBench) -> None:
        """Running requests end normally; queued and new ones fail with a time to retry."""
        bench = loaded(make_bench(slots=1))
        bench.speak("r", "a b c")
        bench.speak("s", "x")
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.turn()
        bench.speak("t", "y")
        bench.inbox.put(Drain(0))
        bench.worker.run()
        assert bench.words("r") == "a b c"
        assert bench.kinds("r")[-1] == "Finished"
        for name in "st":
            (failed,) = bench.messages(name)
            assert failed.code == "shutting_down"
            assert failed.retry_after_s is not None

    def test_deadline(self, bench: WorkerBench) -> None:
        """Requests that run past the deadline fail."""
        loaded(bench)
        bench.speak("r", "a b c", credit=1)
        bench.inbox.put(Drain(30))
        bench.settle()
        bench.clock.advance(31)
        bench.worker.run()
        assert bench.kinds("r") == ["Started", "Audio", "Failed"]
        assert bench.last_message("r").code == "shutting_down"
        assert bench.engines["m"].jobs == set()

    def test_calls(self, make_bench: MakeBench) -> None:
        """No LoadModel is taken any more, and calls that still wait at the end fail."""
        bench = make_bench({"m": 100, "n": 100})
        bench.load_gate.clear()
        bench.call("load", LoadModel(model="m"))
        bench.speak("r", "one")
        bench.settle()
        bench.call("clean", Cleanup())
        bench.turn()
        bench.inbox.put(Drain(30))
        bench.call("late", LoadModel(model="n"))
        bench.worker.run()
        for name in ("load", "clean", "late", "r"):
            (failed,) = bench.messages(name)
            assert failed.code == "shutting_down"
        assert bench.states()["n"] == "absent"

    def test_idle(self, bench: WorkerBench) -> None:
        """An idle worker ends at once."""
        bench.inbox.put(Drain(30))
        bench.worker.run()
        assert bench.sent == []

    def test_snapshot(self, bench: WorkerBench) -> None:
        """The snapshot says that no request is accepted any more."""
        loaded(bench)
        bench.speak("r", "a b", credit=0)
        bench.turn()
        assert bench.snapshot().accepting
        bench.inbox.put(Drain(30))
        assert not bench.snapshot().accepting
