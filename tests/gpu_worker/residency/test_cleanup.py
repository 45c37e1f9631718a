"""Cleanup passes: when models that nobody uses leave, and what is told of it."""

from tests.gpu_worker.fakes import WALL, FakeDevice
from tests.gpu_worker.residency.bench import Bench


class TestIdle:
    """Whose time is over."""

    def test_leaves_at_the_second_it_should(self) -> None:
        """An idle model is offloaded when its time is over and not a second earlier, and dropped likewise."""
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
        """Idle models are looked for every interval."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=30)
        bench.use("a")
        bench.clock.advance(28)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.clock.advance(1)
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_a_long_request_is_not_idle(self) -> None:
        """The idle time begins with the end of the last request, however long it spoke or stalled."""
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

    def test_never_on_its_own_when_disabled(self) -> None:
        """With cleanup switched off nothing leaves by itself, but a pass that is asked for runs."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=False)
        bench.use("a")
        bench.clock.advance(1_000_000)
        bench.settle()
        assert bench.states() == {"a": "resident"}
        bench.residency.start_cleanup()
        bench.settle()
        assert bench.states() == {"a": "offloaded"}

    def test_keep_alive(self) -> None:
        """The last request says how long its model stays; one that says nothing leaves it as configured."""
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

    def test_keep_alive_for_ever(self) -> None:
        """A model that is to stay for ever outlasts every timeout, but makes room where it has to."""
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

    def test_keep_alive_is_for_those_to_say_that_spoke(self) -> None:
        """A request that ends before it has spoken changes nothing about how long the model stays."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", keep_alive_s=-1)
        bench.residency.acquire("a")
        bench.residency.abandon("a")
        bench.clock.advance(1_000)
        bench.settle()
        assert (bench.states(), bench.model("a").keep_alive_s) == ({"a": "resident"}, -1)

    def test_idle_time_begins_with_the_load(self) -> None:
        """A model that was asked for long before its load ended is not idle for that time."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.residency.load("a")
        move = bench.next_transition()
        bench.clock.advance(60)
        bench.finish(move)
        assert bench.advance() == []


class TestPasses:
    """Passes and their figures."""

    def test_figures(self) -> None:
        """A pass tells what it looked at, what it unloaded, and the bytes that the probe measured before and after."""
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

    def test_result_comes_with_the_last_move(self) -> None:
        """Until its moves have ended a pass is under way and the result is the one before."""
        bench = Bench({"a": 100}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.start_cleanup()
        assert bench.residency.cleanup_running
        move = bench.next_transition()
        assert bench.residency.cleanup_running
        assert bench.residency.last_cleanup is None
        bench.finish(move)
        assert bench.advance() == []
        assert not bench.residency.cleanup_running
        assert bench.residency.last_cleanup is not None

    def test_is_not_muddled_with_a_load(self) -> None:
        """A pass asked for during a load begins behind it: its figures are its own."""
        bench = Bench({"a": 100, "b": 50}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        move = bench.next_transition()
        bench.residency.start_cleanup()
        bench.finish(move)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (150, 50)

    def test_with_nothing_to_do(self) -> None:
        """A pass that finds nothing ends at once and says so."""
        bench = Bench({"a": 100})
        bench.residency.start_cleanup()
        assert bench.advance() == []
        result = bench.residency.last_cleanup
        assert result is not None
        assert result.models_checked == []

    def test_an_unload_by_hand_is_not_the_passes(self) -> None:
        """A pass's figures are its own: what is unloaded by hand meanwhile leaves behind it."""
        bench = Bench({"a": 100, "b": 70, "c": 30}, idle_timeout_s=10)
        bench.use("a", "b", "c")
        bench.clock.advance(9)
        bench.residency.start_cleanup()
        move = bench.next_transition()
        bench.residency.unload("c")
        bench.finish(move)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (200, 30)
        assert (result.models_unloaded, result.models_dropped) == (["a", "b"], [])
        assert bench.transitions[-3:] == [("offload", "a"), ("offload", "b"), ("drop", "c")]

    def test_what_is_dropped_is_told_from_what_is_offloaded(self) -> None:
        """A model whose time in host RAM is over left no device."""
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
        """A pass that moves nothing still gives back what allocators keep, but not while somebody speaks, unasked."""
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
        """A pass that has to drop one model to offload another counts both."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(host_budget_bytes=150), idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", "b")
        bench.clock.advance(100)
        bench.settle()
        result = bench.residency.last_cleanup
        assert result is not None
        assert result.models_unloaded == ["a", "b"]
        assert bench.states() == {"a": "absent", "b": "offloaded"}
