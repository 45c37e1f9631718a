"""File checks and downloads, as Residency starts them."""

from gpu_worker.engines.base import JobError
from gpu_worker.residency.manager import FILE_CHECK_S
from gpu_worker.residency.models import ModelState
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestChecks:
    """File checks."""

    def test_before_a_load(self) -> None:
        """A model's files are checked once when it becomes wanted, and never for a restore."""
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

    def test_at_intervals(self) -> None:
        """Files of absent models are checked at intervals, also if nothing asks for the models."""
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
        """A failed load's error is cleared when the files change."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        bench.fail_next(ModelState.ABSENT, message="a file is damaged")
        bench.residency.abandon("a")
        bench.stamps["a"] = "mended"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        assert bench.model("a").detail == ""


class TestDownloads:
    """Downloads."""

    def test_beside_transitions(self) -> None:
        """One model is downloaded at a time, the longest waiting first; other models load meanwhile."""
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

    def test_no_eviction_for_a_download(self) -> None:
        """No model is evicted for one that is still being downloaded."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a")
        bench.remote = {"b"}
        bench.residency.acquire("b")
        bench.settle()
        assert bench.states() == {"a": "resident", "b": "loading"}
        bench.downloaded("b")
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}

    def test_abandoned_during_a_download(self) -> None:
        """A download goes on after its last request left, but the model is "absent" then."""
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

    def test_failed_download(self) -> None:
        """A failed download refuses the requests; its error stays until other files appear."""
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
