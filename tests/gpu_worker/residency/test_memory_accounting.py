"""Memory accounting: which bytes count when one more model has to fit."""

from gpu_worker.residency.models import ModelState
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestDevice:
    """Held and free bytes."""

    def test_other_processes_count(self) -> None:
        """Other processes' memory counts: the driver's free bytes bind even within the budget."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(total_bytes=400, budget_bytes=400))
        bench.use("a")
        bench.device.others_bytes = 250
        bench.use("b")
        assert ("offload", "a") in bench.transitions

    def test_gpu_budget_covers_the_process(self) -> None:
        """On a GPU the budget covers the whole process, with the CUDA context and the codec."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.device.on_device["the context"] = 60
        bench.use("a", "b")
        assert ("offload", "a") in bench.transitions

    def test_cpu_budget_covers_the_models(self) -> None:
        """In CPU mode the budget covers the models alone, not the interpreter."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", budget_bytes=200))
        bench.device.on_device["the interpreter"] = 500
        bench.use("a", "b")
        assert bench.states() == {"a": "resident", "b": "resident"}

    def test_cpu_restore_reuses_memory(self) -> None:
        """In CPU mode a restore reuses the memory of the offloaded weights."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", total_bytes=220, budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.transitions[-2:] == [("offload", "b"), ("restore", "a")]


class TestSizes:
    """A model's expected size."""

    def test_last_measured_size_replaces_the_estimate(self) -> None:
        """The catalogue's estimate counts until the model has been measured."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.sizes["a"] = 180
        bench.use("a", "b")
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "offloaded"}

    def test_growth_does_not_prevent_a_load(self) -> None:
        """A model that grew and was dropped loads by its estimate, since it starts small."""
        bench = Bench({"a": 100, "b": 60}, FakeDevice(budget_bytes=170))
        bench.use("b")
        bench.use("a")
        bench.residency.measured("a", bench.device.put("a", ModelState.RESIDENT, 160))
        bench.residency.unload("a")
        bench.settle()
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "resident"}
        bench.residency.measured("a", bench.device.put("a", ModelState.RESIDENT, 70))
        bench.residency.unload("a")
        bench.settle()
        bench.sizes["a"] = 70
        bench.device.budget_bytes = 140
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "resident"}

    def test_growth_in_use_counts(self) -> None:
        """A resident model's growth shows in its status and counts for its restore."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.use("a")
        bench.residency.measured("a", bench.device.put("a", ModelState.RESIDENT, 160))
        assert bench.model("a").bytes == {"weights": 160}
        bench.use("b")
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "offloaded"}

    def test_an_engine_without_bytes_always_fits(self) -> None:
        """An engine without device memory is never refused for lack of it, and never a victim."""
        bench = Bench({"tiny": 0, "a": 100, "b": 100}, FakeDevice(budget_bytes=100))
        bench.residency.acquire("a")
        bench.settle()
        bench.device.budget_bytes = 50
        bench.use("tiny")
        bench.device.budget_bytes = 100
        bench.residency.release("a", None)
        bench.use("b")
        assert bench.states() == {"tiny": "resident", "a": "offloaded", "b": "resident"}
