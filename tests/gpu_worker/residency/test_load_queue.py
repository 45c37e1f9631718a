"""Who comes to the device next, who waits for room, and who is refused."""

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
    """Who comes first."""

    def test_first_come_first_loaded(self) -> None:
        """Of several wanted models the one that has waited longest comes first, whatever the catalogue's order."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.acquire("b")
        bench.clock.advance(1)
        bench.residency.acquire("a")
        bench.settle()
        assert bench.transitions == [("load", "b"), ("load", "a")]

    def test_a_refusal_holds_up_nobody(self) -> None:
        """Behind a model that does not fit, one that does is loaded in the same turn."""
        bench = Bench({"a": 300, "b": 100}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        refusal, move = bench.advance()
        assert isinstance(refusal, Refusal)
        assert refusal.model == "a"
        assert move == Transition("b", "load")

    def test_waits_for_the_busy_and_others_do_not(self) -> None:
        """Behind a model that waits for room, one that fits is loaded."""
        bench = Bench({"a": 100, "b": 100, "c": 40}, FakeDevice(budget_bytes=150))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.acquire("b")
        bench.residency.acquire("c")
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "absent", "c": "resident"}


class TestWait:
    """Who waits for room."""

    def test_what_is_busy_stays(self) -> None:
        """A model with a request is never evicted: the other waits, and is refused with the arithmetic in the end."""
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

    def test_nothing_is_evicted_in_vain(self) -> None:
        """Where evicting every idle model would not be enough, none is evicted."""
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
        """A model that fits once a busy one is idle comes as soon as it is, and starts its wait anew the next time."""
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

    def test_room_that_others_give_back(self) -> None:
        """A model that waits for room takes it as well where another process gives it back."""
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


class TestAnew:
    """Models that are too large to be restored, and would be smaller if they were loaded."""

    def test_is_loaded(self) -> None:
        """A model whose old size fits no more is dropped from host RAM and loaded: its files are looked at first."""
        bench = an_offloaded_bench(FakeDevice(total_bytes=250, budget_bytes=250))
        bench.device.others_bytes = 100
        looks = bench.checks
        bench.use("a")
        assert bench.transitions[-2:] == [("drop", "a"), ("load", "a")]
        assert bench.checks == looks + 1
        assert bench.states()["a"] == "resident"

    def test_idle_models_leave_for_the_load(self) -> None:
        """Where even the smaller size needs room, idle models make it."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.use("b")
        bench.device.budget_bytes = 120
        bench.residency.acquire("a")
        assert bench.settle() == []
        assert bench.transitions[-3:] == [("drop", "a"), ("offload", "b"), ("load", "a")]

    def test_waits_for_the_busy(self) -> None:
        """Where a busy model is in the way of the smaller size, its end is waited for."""
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

    def test_not_where_a_restore_needs_patience(self) -> None:
        """A model that fits at its old size once others have left keeps its place in host RAM."""
        bench = an_offloaded_bench(FakeDevice(budget_bytes=250))
        bench.residency.acquire("b")
        bench.settle()
        bench.residency.acquire("a")
        assert bench.settle() == []
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.residency.release("b", None)
        assert bench.settle() == []
        assert bench.transitions[-2:] == [("offload", "b"), ("restore", "a")]

    def test_not_where_it_would_not_help(self) -> None:
        """A model that fits at no size is refused and stays in host RAM; why is told until it could be loaded."""
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
    """Who does not come, and why."""

    def test_unavailable_model_is_refused(self) -> None:
        """Requests of a model without weights fail with the reason, until it is said to be available."""
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

    def test_does_not_wait_in_vain(self) -> None:
        """A model that busy ones, idle, would make no room for is refused at once; so is one beside a pinned model."""
        bench = Bench({"a": 100, "b": 200}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.pin("a", True)
        bench.residency.acquire("b")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S

    def test_larger_than_the_budget(self) -> None:
        """A model that no eviction makes room for is refused with a longer pause."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S
        assert "held (by no model)" in refusal.message

    def test_asked_for_in_vain(self) -> None:
        """A load by hand that does not fit is refused once, and then forgotten."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.load("a")
        assert len(bench.advance()) == 1
        assert bench.advance() == []

    def test_refused_for_lack_of_room(self) -> None:
        """Why a model found no room is told until there is some for it, or idle models would make some."""
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


class TestStart:
    """The models that are to be there from the start."""

    def test_the_first_come_first(self) -> None:
        """They come in their order, whatever the catalogue's, and none of them leaves for another."""
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
        """A model that somebody asks for takes the place of one that only the start wanted."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.residency.preload(["a", "b"])
        bench.residency.acquire("b")
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident"}

    def test_larger_than_thought(self) -> None:
        """A model of the start that turns out too large leaves itself, and not one that came before it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.sizes["b"] = 180
        bench.residency.preload(["a", "b"])
        bench.settle()
        assert bench.states() == {"a": "resident", "b": "offloaded"}
