"""Cleanup passes: when idle models leave, and what a pass reports."""

from gpu_worker.residency import ResidencyOptions
from tests.gpu_worker.fakes import WALL, FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestIdle:
    """Idle times."""

    def test_at_the_second(self) -> None:
        """An idle model is offloaded, and later dropped, at the second its time ends."""
        bench = Bench({"a": 100}, idle_timeout_s=300, host_idle_timeout_s=600, cleanup_interval_s=1)
        bench.use("a")
        bench.clock.advance(299)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}
        bench.clock.advance(599)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "absent"}

    def test_is_checked_at_intervals(self) -> None:
        """Passes run at the configured interval."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=30)
        bench.use("a")
        bench.clock.advance(28)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_one_pass_an_interval(self) -> None:
        """No second pass runs before the interval is over."""
        bench = Bench({"a": 100}, cleanup_interval_s=30)
        bench.clock.advance(30)
        bench.settle()
        first = bench.residency.last_cleanup
        assert first is not None
        bench.clock.advance(29)
        bench.settle()
        assert bench.residency.last_cleanup is first
        bench.clock.advance(1)
        bench.settle()
        assert bench.residency.last_cleanup is not first

    def test_a_long_request_is_not_idle(self) -> None:
        """The idle time begins at the end of the last request, however long that request took."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.residency.acquire("a")
        bench.residency.acquire("a")
        for _ in range(100):
            bench.clock.advance(7)
            bench.settle()
        bench.residency.release("a", None)
        bench.clock.advance(9)
        bench.settle()
        bench.clock.advance(60)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.residency.release("a", None)
        bench.clock.advance(10)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_disabled(self) -> None:
        """With cleanup disabled no pass runs by itself, but a requested one does."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=False)
        bench.use("a")
        bench.clock.advance(1_000_000)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.residency.start_cleanup()
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_keep_alive(self) -> None:
        """The last request's keep_alive counts; without one, the configured time."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", keep_alive_s=50)
        bench.clock.advance(49)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}
        bench.use("a")
        bench.clock.advance(10)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_negative_keep_alive(self) -> None:
        """A negative keep_alive outlasts every timeout, but not an eviction for another model."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150), idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", keep_alive_s=-1)
        bench.clock.advance(1_000_000)
        bench.settle()
        assert bench.states()["a"] == "resident"
        bench.use("b")
        assert bench.states()["a"] == "offloaded"
        bench.clock.advance(1_000_000)
        bench.settle()
        bench.clock.advance(1_000_000)
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "absent"}

    def test_keep_alive_of_a_request_without_slot(self) -> None:
        """A request that never held a slot does not change the keep_alive."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", keep_alive_s=-1)
        bench.residency.acquire("a")
        bench.residency.abandon("a")
        bench.clock.advance(1_000)
        bench.settle()
        assert (bench.states(), bench.model("a").keep_alive_s) == ({"a": "resident"}, -1)

    def test_idle_time_begins_with_the_load(self) -> None:
        """The time of the load does not count as idle."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.residency.load("a")
        transition = bench.next_transition()
        bench.clock.advance(60)
        bench.finish(transition)
        assert bench.advance() == []


class TestOtherOptions:
    """Options that a reload changes."""

    def test_idle_times(self) -> None:
        """A shorter time counts for a model that is idle already, from the next pass on, which comes sooner too."""
        bench = Bench({"a": 100}, idle_timeout_s=3600, cleanup_interval_s=3600)
        bench.use("a")
        bench.clock.advance(60)
        bench.residency.use(ResidencyOptions(idle_timeout_s=60, cleanup_interval_s=1))
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}
        bench.residency.use(ResidencyOptions(idle_timeout_s=60, host_idle_timeout_s=1, cleanup_enabled=False))
        bench.clock.advance(100)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_a_smaller_budget(self) -> None:
        """Idle models make room at once; no pass is needed."""
        bench = Bench({"a": 600, "b": 300}, cleanup_enabled=False)
        bench.use("a")
        bench.use("b")
        bench.settle()
        bench.device.budget_bytes = 500
        bench.residency.use(ResidencyOptions(cleanup_enabled=False))
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}


class TestPasses:
    """Passes and their results."""

    def test_figures(self) -> None:
        """A result names the checked and unloaded models, and the bytes measured before and after."""
        bench = Bench({"a": 100, "b": 70, "c": 30}, idle_timeout_s=10)
        bench.use("a", "b")
        bench.clock.advance(9)
        bench.residency.start_cleanup()
        bench.settle()
        assert not bench.residency.cleanup_running
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (170, 70)
        assert (result.models_checked, result.models_unloaded) == (["a", "b"], ["a"])
        assert result.timestamp == WALL + bench.clock.now

    def test_result_comes_after_the_last_transition(self) -> None:
        """A pass runs until its last transition has ended; until then `last_cleanup` is the one before."""
        bench = Bench({"a": 100}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.start_cleanup()
        assert bench.residency.cleanup_running
        transition = bench.next_transition()
        assert bench.residency.cleanup_running
        assert bench.residency.last_cleanup is None
        bench.finish(transition)
        assert bench.advance() == []
        assert not bench.residency.cleanup_running
        assert bench.residency.last_cleanup is not None

    def test_during_a_load(self) -> None:
        """A pass requested during a load begins after it, so its figures are its own."""
        bench = Bench({"a": 100, "b": 50}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        transition = bench.next_transition()
        bench.residency.start_cleanup()
        bench.finish(transition)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (150, 50)

    def test_with_nothing_to_do(self) -> None:
        """A pass with nothing to do ends at once, with an empty result."""
        bench = Bench({"a": 100})
        bench.residency.start_cleanup()
        assert bench.advance() == []
        result = bench.residency.last_cleanup
        assert result is not None
        assert result.models_checked == []

    def test_unload_during_a_pass(self) -> None:
        """An admin's unload during a pass happens after it and is not in its result."""
        bench = Bench({"a": 100, "b": 70, "c": 30}, idle_timeout_s=10)
        bench.use("a", "b", "c")
        bench.clock.advance(9)
        bench.residency.start_cleanup()
        transition = bench.next_transition()
        bench.residency.unload("c")
        bench.finish(transition)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (200, 30)
        assert (result.models_unloaded, result.models_dropped) == (["a", "b"], [])
        assert bench.transitions[-3:] == [("offload", "a"), ("offload", "b"), ("drop", "c")]

    def test_dropped_and_offloaded(self) -> None:
        """A result tells dropped models from offloaded ones."""
        bench = Bench({"a": 100, "b": 100}, idle_timeout_s=10, host_idle_timeout_s=30)
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.use("b")
        bench.clock.advance(40)
        bench.residency.start_cleanup()
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.models_unloaded, result.models_dropped) == (["a", "b"], ["a"])

    def test_empties_caches(self) -> None:
        """A pass without transitions empties caches, but one by the clock not while requests run."""
        bench = Bench({"a": 100}, cleanup_interval_s=10)
        bench.residency.acquire("a")
        bench.settle()
        bench.clock.advance(10)
        bench.settle()
        assert bench.device.reclaimed == 0
        bench.residency.start_cleanup()
        bench.settle()
        assert bench.device.reclaimed == 1
        bench.residency.release("a", None)
        bench.clock.advance(10)
        bench.settle()
        assert bench.device.reclaimed == 2

    def test_frees_host_room_first(self) -> None:
        """A drop that makes room in host RAM for an offload counts as the pass's."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(host_budget_bytes=150), idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", "b")
        bench.clock.advance(100)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert result.models_unloaded == ["a", "b"]
        assert bench.states() == {"a": "absent", "b": "offloaded"}
