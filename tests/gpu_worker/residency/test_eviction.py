"""Eviction: which model leaves the device or host RAM, and for where."""

from gpu_worker.residency.manager import RECLAIM_S
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestDevice:
    """Leaving the device."""

    def test_evicts_least_recently_used(self) -> None:
        """A load evicts as few idle models as needed, least recently used first."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=250))
        bench.use("a", "b", "a", "c")
        assert bench.transitions[-2:] == [("offload", "b"), ("load", "c")]
        assert bench.states() == {"a": "resident", "b": "offloaded", "c": "resident"}

    def test_caches_are_emptied_before_a_refusal(self) -> None:
        """Before a refusal the allocator's caches are emptied, at most every few seconds."""

        class Caching(FakeDevice):
            """A device whose allocator caches 100 bytes until `reclaim`."""

            def reclaim(self, *, collect: bool) -> None:
                super().reclaim(collect=collect)
                self.on_device.pop("cache", None)

        device = Caching(budget_bytes=150)
        device.on_device["cache"] = 100
        bench = Bench({"a": 100, "b": 300}, device)
        bench.use("a")
        assert (bench.states()["a"], device.reclaimed) == ("resident", 1)
        for _ in range(3):
            bench.residency.acquire("b")
            assert len(bench.settle()) == 1
            bench.residency.abandon("b")
        assert device.reclaimed == 1
        bench.clock.advance(RECLAIM_S)
        bench.residency.acquire("b")
        assert len(bench.settle()) == 1
        assert device.reclaimed == 2

    def test_larger_than_the_budget_while_busy(self) -> None:
        """A model over the budget serves its requests; idle models are evicted for it, and it once it is idle."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.use("a")
        bench.sizes["b"] = 300
        bench.residency.acquire("b")
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.residency.release("b", None)
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "offloaded"}

    def test_keep_alive_zero(self) -> None:
        """keep_alive 0 evicts a model after its last request, even with cleanup disabled."""
        bench = Bench({"a": 100}, cleanup_enabled=False)
        bench.residency.acquire("a")
        bench.use("a", keep_alive_s=0)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.residency.release("a", 0)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_cpu_mode_drops(self) -> None:
        """In CPU mode, a shortage of RAM drops models, offloaded ones first."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(kind="cpu", total_bytes=250, budget_bytes=150))
        bench.use("a", "b")
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "absent"}
        bench.use("c")
        assert ("drop", "a") in bench.transitions
        assert bench.states() == {"a": "absent", "b": "offloaded", "c": "resident"}


class TestHost:
    """Places in host RAM."""

    def test_drops_least_recently_used(self) -> None:
        """If the host budget is full, the least recently used offloaded model is dropped for the next one."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b", "c")
        assert bench.transitions[-3:] == [("drop", "a"), ("offload", "b"), ("load", "c")]

    def test_the_victim_is_the_least_recently_used(self) -> None:
        """A victim that is itself the least recently used is dropped if host RAM is full."""
        device = FakeDevice(budget_bytes=250, host_budget_bytes=150)
        bench = Bench({"a": 100, "b": 100, "c": 200}, device)
        bench.use("a")
        bench.use("b", keep_alive_s=0)
        bench.settle()
        bench.use("c")
        assert bench.transitions[-2:] == [("drop", "a"), ("load", "c")]

    def test_larger_in_host_ram_than_on_the_device(self) -> None:
        """A model that turns out to exceed the host budget is dropped."""
        bench = Bench({"a": 100}, FakeDevice(host_budget_bytes=150))
        bench.use("a", keep_alive_s=0)
        bench.sizes["a"] = 200
        bench.settle()
        assert bench.transitions[-2:] == [("offload", "a"), ("drop", "a")]

    def test_wanted_models_stay_in_host_ram(self) -> None:
        """A model that waits to be restored is not dropped to make room in host RAM for its own victim."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b")
        bench.residency.load("a")
        bench.settle()
        assert bench.transitions[-2:] == [("drop", "b"), ("restore", "a")]

    def test_too_large_for_the_host(self) -> None:
        """A model larger than the host budget is dropped, not offloaded."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=50))
        bench.use("a", "b")
        assert bench.states() == {"a": "absent", "b": "resident"}

    def test_short_of_host_ram(self) -> None:
        """A host that is short of RAM takes no offloaded model, whatever its budget."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_total_bytes=50))
        bench.use("a", "b")
        assert bench.states()["a"] == "absent"


class TestOutOfMemory:
    """Eviction after a step ran out of memory."""

    def test_every_idle_model_leaves(self) -> None:
        """Every idle model leaves, least recently used first."""
        bench = Bench({"a": 100, "b": 100, "c": 100, "d": 100})
        bench.use("b", "a", "c")
        bench.residency.acquire("d")
        bench.settle()
        assert bench.residency.evict_idle()
        assert bench.residency.evicting
        bench.settle()
        assert not bench.residency.evicting
        assert bench.transitions[-3:] == [("offload", "b"), ("offload", "a"), ("offload", "c")]
        assert bench.states()["d"] == "resident"
        assert not bench.residency.evict_idle()

    def test_during_a_load(self) -> None:
        """`evicting` is False during a load, which running streams must not wait for; idle models leave afterwards."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("a")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("b")
        transition = bench.next_transition()
        assert bench.residency.evict_idle()
        assert not bench.residency.evicting
        bench.finish(transition)
        assert bench.residency.evicting
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "resident"}

    def test_spares_models_that_became_busy(self) -> None:
        """A marked model that gets a request before it left stays."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a", "b")
        bench.residency.evict_idle()
        transition = bench.next_transition()
        bench.residency.acquire("b")
        bench.finish(transition)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("load", "b"), ("offload", "a")]
