"""What counts where it is reckoned whether one more model fits."""

from gpu_worker.residency.models import ModelState
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestDevice:
    """What is held, and what is free."""

    def test_others_memory_counts(self) -> None:
        """Within the budget, what the driver says is free decides: other processes hold memory too."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(total_bytes=400, budget_bytes=400))
        bench.use("a")
        bench.device.others_bytes = 250
        bench.use("b")
        assert ("offload", "a") in bench.transitions

    def test_all_that_the_process_holds_counts_on_a_gpu(self) -> None:
        """On a GPU the budget bounds the whole process, the CUDA context and the codec among it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.device.on_device["the context"] = 60
        bench.use("a", "b")
        assert ("offload", "a") in bench.transitions

    def test_on_a_cpu_the_models_count(self) -> None:
        """On a CPU the interpreter is no part of the budget, only what the models hold."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", budget_bytes=200))
        bench.device.on_device["the interpreter"] = 500
        bench.use("a", "b")
        assert bench.states() == {"a": "resident", "b": "resident"}

    def test_on_a_cpu_offloaded_weights_need_no_second_place(self) -> None:
        """Restoring on a CPU takes the room that the offloaded weights leave."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", total_bytes=220, budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.transitions[-2:] == [("offload", "b"), ("restore", "a")]


class TestSizes:
    """How large a model will be."""

    def test_last_measured_size_replaces_the_estimate(self) -> None:
        """The catalogue's estimate counts until a model has been measured, its size in use from then on."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.sizes["a"] = 180
        bench.use("a", "b")
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "offloaded"}

    def test_growth_does_not_forbid_a_new_load(self) -> None:
        """A model that grew and was dropped is loaded by the estimate, for it begins small."""
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
        """What a model has grown to in use is told, and counts when it comes back from host RAM."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.use("a")
        bench.residency.measured("a", bench.device.put("a", ModelState.RESIDENT, 160))
        assert bench.model("a").bytes == {"weights": 160}
        bench.use("b")
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "offloaded"}

    def test_a_model_without_bytes_always_fits(self) -> None:
        """An engine that holds no device memory is never refused for it, nor evicted to make room."""
        bench = Bench({"tiny": 0, "a": 100, "b": 100}, FakeDevice(budget_bytes=100))
        bench.residency.acquire("a")
        bench.settle()
        bench.device.budget_bytes = 50
        bench.use("tiny")
        bench.device.budget_bytes = 100
        bench.residency.release("a", None)
        bench.use("b")
        assert bench.states() == {"tiny": "resident", "a": "offloaded", "b": "resident"}
