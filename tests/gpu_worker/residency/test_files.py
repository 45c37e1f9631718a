"""What is done with models' files, and when."""

from gpu_worker.engines.base import JobError
from gpu_worker.residency.manager import FILE_CHECK_S
from gpu_worker.residency.models import ModelState
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestLooks:
    """Looking at what is there."""

    def test_before_a_load(self) -> None:
        """A model's files are looked at whenever it begins to be wanted, once, and never for a restore."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        bench.residency.acquire("a")
        bench.settle()
        assert bench.checks == 1
        bench.residency.release("a", None)
        bench.residency.release("a", 0)
        bench.settle()
        bench.use("a")
        assert bench.checks == 1
        bench.residency.unload("a")
        bench.settle()
        bench.use("a")
        assert bench.checks == 2

    def test_now_and_then(self) -> None:
        """What comes and goes by itself is noticed, though nothing moves and nobody asks."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("b")
        looks = bench.checks
        bench.problems["a"] = "its weights are gone"
        bench.clock.advance(FILE_CHECK_S)
        bench.advance()
        assert bench.states() == {"a": "unavailable", "b": "resident"}
        assert bench.checks == looks + 1
        bench.advance()
        assert bench.checks == looks + 1

    def test_failed_load_of_other_files(self) -> None:
        """What was wrong with a model's files is forgotten when they change."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        bench.fail_next(ModelState.ABSENT, message="a file is damaged")
        bench.residency.abandon("a")
        bench.stamps["a"] = "mended"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        assert bench.model("a").detail == ""


class TestFetches:
    """Weights that are elsewhere."""

    def test_beside_the_moves(self) -> None:
        """One model is fetched at a time, the longest wanted first; others are loaded meanwhile."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.remote = {"a", "b"}
        for model in "bac":
            bench.residency.acquire(model)
        bench.settle()
        assert bench.downloading == ["b"]
        assert bench.states() == {"a": "absent", "b": "loading", "c": "resident"}
        assert bench.downloaded("b") is None
        bench.settle()
        assert bench.downloading == ["a"]
        assert bench.downloaded("a") is None
        bench.settle()
        assert set(bench.states().values()) == {"resident"}

    def test_nobody_is_evicted_for_a_model_that_is_fetched(self) -> None:
        """Room is made when the model can be loaded, not hours before."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a")
        bench.remote = {"b"}
        bench.residency.acquire("b")
        bench.settle()
        assert bench.states() == {"a": "resident", "b": "loading"}
        bench.downloaded("b")
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}

    def test_given_up_while_it_is_fetched(self) -> None:
        """The fetch goes on for the next who asks, but the model is "absent": nothing waits for it."""
        bench = Bench({"a": 100})
        bench.remote = {"a"}
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.abandon("a")
        assert bench.states() == {"a": "absent"}
        bench.residency.acquire("a")
        bench.settle()
        assert bench.downloading == ["a"]
        bench.downloaded("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_cannot_be_fetched(self) -> None:
        """Who waits is refused, and why is told until something changes; what arrived in part changes nothing."""
        bench = Bench({"a": 100})
        bench.remote = {"a"}
        bench.residency.acquire("a")
        bench.settle()
        refusal = bench.downloaded("a", JobError("model_unavailable", "the hub is out of reach"))
        assert refusal is not None
        assert (refusal.code, refusal.message) == ("model_unavailable", "the hub is out of reach")
        bench.residency.abandon("a")
        bench.stamps["a"] = "half of it"
        for _ in range(2):
            bench.clock.advance(FILE_CHECK_S)
            bench.settle()
            assert (bench.model("a").state, bench.model("a").detail) == ("absent", "the hub is out of reach")
        bench.stamps["a"] = "all of it, copied in by hand"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        assert bench.model("a").detail == ""
