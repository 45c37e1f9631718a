"""Who leaves so that there is room, and where to."""

from gpu_worker.residency.manager import RECLAIM_S
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestDevice:
    """Who leaves the device."""

    def test_evicts_least_recently_used(self) -> None:
        """A load that does not fit the budget evicts idle models, the least recently used first, as few as needed."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=250))
        bench.use("a", "b", "a", "c")
        assert bench.transitions[-2:] == [("offload", "b"), ("load", "c")]
        assert bench.states() == {"a": "resident", "b": "offloaded", "c": "resident"}

    def test_caches_are_emptied_before_anybody_is_refused(self) -> None:
        """What an allocator only keeps for later is room too, looked for every few seconds at most."""

        class Caching(FakeDevice):
            """A device whose allocator keeps 100 bytes until it is told not to."""

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

    def test_grown_over_the_budget(self) -> None:
        """A model larger than estimated speaks, for it is there; idle models leave for it, and it when it is idle."""
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
        """A model that is not to stay leaves with its last request, even with cleanup switched off."""
        bench = Bench({"a": 100}, cleanup_enabled=False)
        bench.residency.acquire("a")
        bench.use("a", keep_alive_s=0)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.residency.release("a", 0)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_on_a_cpu_only_dropping_frees_ram(self) -> None:
        """On a CPU that is short of RAM, models are dropped: offloaded ones first."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(kind="cpu", total_bytes=250, budget_bytes=150))
        bench.use("a", "b")
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "absent"}
        bench.use("c")
        assert ("drop", "a") in bench.transitions
        assert bench.states() == {"a": "absent", "b": "offloaded", "c": "resident"}


class TestHost:
    """Who gets a place in host RAM, and who gives one up."""

    def test_over_the_host_budget_the_oldest_is_dropped(self) -> None:
        """Where host RAM has no room for one more, the least recently used offloaded model gives up its place."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b", "c")
        assert bench.transitions[-3:] == [("drop", "a"), ("offload", "b"), ("load", "c")]

    def test_the_oldest_is_not_put_before_others(self) -> None:
        """A model that leaves the device and is the least recently used of all is dropped where host RAM is full."""
        device = FakeDevice(budget_bytes=250, host_budget_bytes=150)
        bench = Bench({"a": 100, "b": 100, "c": 200}, device)
        bench.use("a")
        bench.use("b", keep_alive_s=0)
        bench.settle()
        bench.use("c")
        assert bench.transitions[-2:] == [("drop", "a"), ("load", "c")]

    def test_larger_in_host_ram_than_on_the_device(self) -> None:
        """A model that turns out to be over the host's budget when it has got there is dropped."""
        bench = Bench({"a": 100}, FakeDevice(host_budget_bytes=150))
        bench.use("a", keep_alive_s=0)
        bench.sizes["a"] = 200
        bench.settle()
        assert bench.transitions[-2:] == [("offload", "a"), ("drop", "a")]

    def test_what_is_wanted_keeps_its_place(self) -> None:
        """A model that waits to be restored is not dropped to make host room for the one that leaves for it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b")
        bench.residency.load("a")
        bench.settle()
        assert bench.transitions[-2:] == [("drop", "b"), ("restore", "a")]

    def test_too_large_for_the_host(self) -> None:
        """A model that host RAM has no room for at all is dropped, not offloaded."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=50))
        bench.use("a", "b")
        assert bench.states() == {"a": "absent", "b": "resident"}

    def test_short_of_host_ram(self) -> None:
        """On a GPU a host that is short of RAM is not filled up, whatever its budget."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_total_bytes=50))
        bench.use("a", "b")
        assert bench.states()["a"] == "absent"


class TestMake:
    """Room for a step that ran out of memory."""

    def test_every_idle_model_leaves(self) -> None:
        """For a step that ran out of memory every idle model leaves, the least recently used first."""
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
        """Nobody is to wait for a load that is in flight; what is idle leaves behind it."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("a")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("b")
        move = bench.next_transition()
        assert bench.residency.evict_idle()
        assert not bench.residency.evicting
        bench.finish(move)
        assert bench.residency.evicting
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "resident"}

    def test_spares_who_became_busy(self) -> None:
        """A model that gets a request before its turn to leave came stays."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a", "b")
        bench.residency.evict_idle()
        move = bench.next_transition()
        bench.residency.acquire("b")
        bench.finish(move)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("load", "b"), ("offload", "a")]
