"""The load queue: which wanted model loads next, which waits for room, which is refused."""

from gpu_worker.residency.models import Transition
from gpu_worker.residency.policy import BUSY_RETRY_S, FULL_RETRY_S, SHORTAGE_WAIT_S, Refusal
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench


def an_offloaded_bench(device: FakeDevice) -> Bench:
    """`a` was loaded with twice its estimate of 100 bytes and is offloaded; a load of it would take 100 now."""
    bench = Bench({"a": 100, "b": 60}, device)
    bench.sizes["a"] = 200
    bench.use("a", keep_alive_s=0)
    bench.settle()
    bench.sizes["a"] = 100
    assert bench.states()["a"] == "offloaded"
    return bench


class TestOrder:
    """The order of loads."""

    def test_first_come_first_loaded(self) -> None:
        """The model that has waited longest loads first; the catalogue's order does not count."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.acquire("b")
        bench.clock.advance(1)
        bench.residency.acquire("a")
        bench.settle()
        assert bench.transitions == [("load", "b"), ("load", "a")]

    def test_a_refusal_delays_no_other(self) -> None:
        """A refused model does not delay the next one in the queue, which loads in the same turn."""
        bench = Bench({"a": 300, "b": 100}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        refusal, transition = bench.advance()
        assert isinstance(refusal, Refusal)
        assert refusal.model == "a"
        assert transition == Transition("b", "load")

    def test_a_wait_delays_no_other(self) -> None:
        """Behind a model that waits for room, one that fits is loaded."""
        bench = Bench({"a": 100, "b": 100, "c": 40}, FakeDevice(budget_bytes=150))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.acquire("b")
        bench.residency.acquire("c")
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "absent", "c": "resident"}


class TestWaiting:
    """Waiting for room."""

    def test_busy_models_stay(self) -> None:
        """A busy model is never evicted. The other model waits, then is refused with the arithmetic."""
        bench = Bench({"a": 100 * 2**20, "b": 60 * 2**20}, FakeDevice(total_bytes=2**40, budget_bytes=150 * 2**20))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.acquire("b")
        assert bench.settle() == []
        bench.clock.advance(SHORTAGE_WAIT_S - 1)
        assert bench.settle() == []
        bench.clock.advance(1)
        (refusal,) = bench.settle()
        assert (refusal.model, refusal.code, refusal.retry_after_s) == ("b", "insufficient_vram", BUSY_RETRY_S)
        for figure in ("b needs 60 MiB", "budget of 150 MiB", "100 MiB are held", "a 100 MiB (busy)", "back 0 MiB"):
            assert figure in refusal.message
        assert bench.states() == {"a": "resident", "b": "absent"}

    def test_no_eviction_in_vain(self) -> None:
        """If evicting every idle model is not enough, none is evicted."""
        bench = Bench({"a": 100, "b": 100, "c": 200}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.use("b")
        bench.residency.acquire("c")
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "resident", "c": "absent"}
        bench.residency.release("a", None)
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "offloaded", "c": "resident"}

    def test_waits_for_the_busy(self) -> None:
        """A waiting model loads as soon as the busy model is idle; the next wait starts at zero."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        for model, other in (("b", "a"), ("a", "b"), ("b", "a")):
            bench.residency.acquire(other)
            bench.settle()
            bench.residency.acquire(model)
            assert bench.settle() == []
            bench.clock.advance(SHORTAGE_WAIT_S - 1)
            assert bench.settle() == []
            bench.residency.release(other, None)
            assert bench.settle() == []
            assert bench.states() == {model: "resident", other: "offloaded"}
            bench.residency.release(model, None)

    def test_memory_freed_by_other_processes(self) -> None:
        """A waiting model loads when another process frees memory."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(total_bytes=250, budget_bytes=250))
        bench.residency.acquire("a")
        bench.settle()
        bench.device.others_bytes = 100
        bench.residency.acquire("b")
        assert bench.settle() == []
        bench.device.others_bytes = 0
        bench.clock.advance(1)
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "resident"}


class TestReload:
    """Models that are too large to be restored, but small enough to be loaded afresh."""

    def test_is_loaded(self) -> None:
        """A model whose old size no longer fits is dropped from host RAM and loaded, after a check of its files."""
        bench = an_offloaded_bench(FakeDevice(total_bytes=250, budget_bytes=250))
        bench.device.others_bytes = 100
        looks = bench.checks
        bench.use("a")
        assert bench.transitions[-2:] == [("drop", "a"), ("load", "a")]
        assert bench.checks == looks + 1
        assert bench.states()["a"] == "resident"

    def test_evicts_idle_models(self) -> None:
        """Idle models are evicted for the smaller size too."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.use("b")
        bench.device.budget_bytes = 120
        bench.residency.acquire("a")
        assert bench.settle() == []
        assert bench.transitions[-3:] == [("drop", "a"), ("offload", "b"), ("load", "a")]

    def test_waits_for_the_busy(self) -> None:
        """The reload waits for a busy model that is in the way."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.residency.acquire("b")
        bench.settle()
        bench.device.budget_bytes = 120
        bench.residency.acquire("a")
        assert bench.settle() == []
        assert bench.states() == {"a": "absent", "b": "resident"}
        bench.residency.release("b", None)
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "offloaded"}

    def test_a_restore_that_fits_later_is_awaited(self) -> None:
        """A model that fits at its old size once others are idle stays in host RAM until then."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.residency.acquire("b")
        bench.settle()
        bench.residency.acquire("a")
        assert bench.settle() == []
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.residency.release("b", None)
        assert bench.settle() == []
        assert bench.transitions[-2:] == [("offload", "b"), ("restore", "a")]

    def test_fits_at_no_size(self) -> None:
        """A model that fits at no size is refused and stays offloaded; its status says why until it would fit."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.device.budget_bytes = 90
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        assert (refusal.code, refusal.retry_after_s) == ("insufficient_vram", FULL_RETRY_S)
        bench.residency.abandon("a")
        bench.clock.advance(BUSY_RETRY_S)
        bench.settle()
        assert (bench.model("a").state, bench.model("a").detail) == ("offloaded", refusal.message)
        bench.device.budget_bytes = 100
        bench.clock.advance(BUSY_RETRY_S)
        bench.settle()
        assert (bench.model("a").state, bench.model("a").detail) == ("offloaded", "")


class TestRefusals:
    """Refusals and their reasons."""

    def test_unavailable_model_is_refused(self) -> None:
        """Requests of a model without weights fail with the reason, until the weights are there."""
        bench = Bench({"a": 100})
        bench.problems["a"] = "there are no weights"
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        assert refusal.code == "model_unavailable"
        assert refusal.message == "a: there are no weights"
        assert bench.states() == {"a": "unavailable"}
        bench.residency.abandon("a")
        bench.problems.clear()
        bench.use("a")
        assert bench.states() == {"a": "resident"}

    def test_no_wait_in_vain(self) -> None:
        """A model that does not fit beside a pinned model is refused at once."""
        bench = Bench({"a": 100, "b": 200}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.pin("a", True)
        bench.residency.acquire("b")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S

    def test_larger_than_the_budget(self) -> None:
        """A model larger than the budget is refused with a longer Retry-After."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S
        assert "held (by no model)" in refusal.message

    def test_admin_load_is_refused_once(self) -> None:
        """An admin's load that does not fit is refused once, and then forgotten."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.load("a")
        assert len(bench.advance()) == 1
        assert bench.advance() == []

    def test_refused_for_lack_of_room(self) -> None:
        """The status shows why a model found no room, until it would fit again."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("b")
        bench.residency.pin("b", True)
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        bench.residency.abandon("a")
        bench.stamps["a"] = "changed"
        bench.clock.advance(BUSY_RETRY_S)
        bench.settle()
        assert bench.model("a").detail == refusal.message
        bench.residency.pin("b", False)
        bench.clock.advance(BUSY_RETRY_S)
        bench.settle()
        assert bench.model("a").detail == ""
        assert bench.states() == {"a": "absent", "b": "resident"}


class TestPreload:
    """Models that are preloaded at start."""

    def test_order_of_preloads(self) -> None:
        """They load in the given order, and none is evicted for another."""
        bench = Bench({"a": 100, "b": 100, "c": 40}, FakeDevice(budget_bytes=150))
        bench.residency.preload(["b", "a", "c"])
        assert bench.residency.preloading == ["b", "a", "c"]
        refusals = []
        while decisions := bench.advance():
            for decision in decisions:
                (bench.finish if isinstance(decision, Transition) else refusals.append)(decision)
        assert bench.transitions == [("load", "b"), ("load", "c")]
        (refusal,) = refusals
        assert (refusal.model, refusal.code) == ("a", "insufficient_vram")
        assert "b 0 MiB (preloaded)" in refusal.message
        assert bench.residency.preloading == []
        assert bench.model("a").detail == refusal.message

    def test_requests_evict_them(self) -> None:
        """A request evicts a model that only the start wanted."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.residency.preload(["a", "b"])
        bench.residency.acquire("b")
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}

    def test_larger_than_estimated(self) -> None:
        """A preloaded model that exceeds its estimate is evicted itself, not one that came before it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.sizes["b"] = 180
        bench.residency.preload(["a", "b"])
        bench.settle()
        assert bench.states() == {"a": "resident", "b": "offloaded"}
