"""Which model is where: decided by the figures, the clock and who needs what."""

import pytest

from gpu_worker.arrivals import BUSY_RETRY_S, FULL_RETRY_S, ROOM_WAIT_S, Refusal
from gpu_worker.engines.base import JobError
from gpu_worker.errands import LOOK_S
from gpu_worker.moves import Move
from gpu_worker.residency import ModelBusyError
from tests.gpu_worker.fakes import WALL, Bench, FakeDevice, done, failed


class TestComing:
    """How a model comes to the device."""

    def test_first_request_loads(self) -> None:
        """A request's model is loaded, is "loading" meanwhile, and its measured bytes are told afterwards."""
        bench = Bench({"a": 100})
        assert bench.states() == {"a": "absent"}
        bench.residency.acquire("a")
        move = bench.next_move()
        assert move == Move(model="a", kind="load")
        assert bench.states() == {"a": "loading"}
        bench.finish(move)
        assert bench.states() == {"a": "resident"}
        assert bench.model("a").bytes == {"weights": 100}
        assert bench.model("a").references == 1

    def test_one_move_at_a_time(self) -> None:
        """Nothing is decided while a move is in flight: its outcome changes the figures."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.acquire("a")
        bench.residency.acquire("b")
        move = bench.next_move()
        assert bench.plan() == []
        bench.finish(move)
        assert bench.next_move() == Move(model="b", kind="load")

    def test_first_come_first_loaded(self) -> None:
        """Of several wanted models the one that has waited longest comes first, whatever the catalogue's order."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.acquire("b")
        bench.clock.advance(1)
        bench.residency.acquire("a")
        bench.settle()
        assert bench.moves == [("load", "b"), ("load", "a")]

    def test_asked_for(self) -> None:
        """A model is loaded because somebody asked, without a request; asking again changes nothing."""
        bench = Bench({"a": 100})
        bench.residency.ask_load("a")
        bench.residency.ask_load("a")
        bench.settle()
        bench.residency.ask_load("a")
        assert bench.plan() == []
        assert bench.moves == [("load", "a")]

    def test_idle_time_begins_with_the_load(self) -> None:
        """A model that was asked for long before its load ended is not idle for that time."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.residency.ask_load("a")
        move = bench.next_move()
        bench.clock.advance(60)
        bench.finish(move)
        assert bench.plan() == []

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


class TestRoom:
    """Who makes room, and what is said when nobody can."""

    def test_evicts_least_recently_used(self) -> None:
        """A load that does not fit the budget evicts idle models, the least recently used first, as few as needed."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=250))
        bench.use("a", "b", "a", "c")
        assert bench.moves[-2:] == [("offload", "b"), ("load", "c")]
        assert bench.states() == {"a": "resident", "b": "offloaded", "c": "resident"}

    def test_restores_what_was_offloaded(self) -> None:
        """An offloaded model comes back from host RAM, not from disk."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.moves == [
            ("load", "a"),
            ("offload", "a"),
            ("load", "b"),
            ("offload", "b"),
            ("restore", "a"),
        ]

    def test_others_memory_counts(self) -> None:
        """Within the budget, what the driver says is free decides: other processes hold memory too."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(total_bytes=400, budget_bytes=400))
        bench.use("a")
        bench.device.others_bytes = 250
        bench.use("b")
        assert ("offload", "a") in bench.moves

    def test_all_that_the_process_holds_counts_on_a_gpu(self) -> None:
        """On a GPU the budget bounds the whole process, the CUDA context and the codec among it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.device.on_device["the context"] = 60
        bench.use("a", "b")
        assert ("offload", "a") in bench.moves

    def test_what_is_busy_stays(self) -> None:
        """A model with a request is never evicted: the other waits, and is refused with the arithmetic in the end."""
        bench = Bench({"a": 100 * 2**20, "b": 60 * 2**20}, FakeDevice(total_bytes=2**40, budget_bytes=150 * 2**20))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.acquire("b")
        assert bench.settle() == []
        bench.clock.advance(ROOM_WAIT_S - 1)
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
            bench.clock.advance(ROOM_WAIT_S - 1)
            assert bench.settle() == []
            bench.residency.release(other, None)
            assert bench.settle() == []
            assert bench.states() == {model: "resident", other: "offloaded"}
            bench.residency.release(model, None)

    def test_waits_for_the_busy_and_others_do_not(self) -> None:
        """Behind a model that waits for room, one that fits is loaded."""
        bench = Bench({"a": 100, "b": 100, "c": 40}, FakeDevice(budget_bytes=150))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.acquire("b")
        bench.residency.acquire("c")
        assert bench.settle() == []
        assert bench.states() == {"a": "resident", "b": "absent", "c": "resident"}

    def test_does_not_wait_in_vain(self) -> None:
        """A model that busy ones, idle, would make no room for is refused at once; so is one beside a pinned model."""
        bench = Bench({"a": 100, "b": 200}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.pin("a", True)
        bench.residency.acquire("b")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S

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
        bench.clock.advance(BUSY_RETRY_S)
        bench.residency.acquire("b")
        assert len(bench.settle()) == 1
        assert device.reclaimed == 2

    def test_larger_than_the_budget(self) -> None:
        """A model that no eviction makes room for is refused with a longer pause."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        (refusal,) = bench.settle()
        assert refusal.retry_after_s == FULL_RETRY_S
        assert "held (by no model)" in refusal.message

    def test_a_refusal_holds_up_nobody(self) -> None:
        """Behind a model that does not fit, one that does is loaded in the same turn."""
        bench = Bench({"a": 300, "b": 100}, FakeDevice(budget_bytes=250))
        bench.residency.acquire("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        refusal, move = bench.plan()
        assert isinstance(refusal, Refusal)
        assert refusal.model == "a"
        assert move == Move(model="b", kind="load")

    def test_asked_for_in_vain(self) -> None:
        """A load by hand that does not fit is refused once, and then forgotten."""
        bench = Bench({"a": 300}, FakeDevice(budget_bytes=250))
        bench.residency.ask_load("a")
        assert len(bench.plan()) == 1
        assert bench.plan() == []

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
        bench.residency.measured("a", bench.device.place("a", "resident", 160))
        bench.residency.ask_unload("a")
        bench.settle()
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "resident"}
        bench.residency.measured("a", bench.device.place("a", "resident", 70))
        bench.residency.ask_unload("a")
        bench.settle()
        bench.sizes["a"] = 70
        bench.device.budget_bytes = 140
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "resident"}

    def test_growth_in_use_counts(self) -> None:
        """What a model has grown to in use is told, and counts when it comes back from host RAM."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=250))
        bench.use("a")
        bench.residency.measured("a", bench.device.place("a", "resident", 160))
        assert bench.model("a").bytes == {"weights": 160}
        bench.use("b")
        assert bench.states() == {"a": "offloaded", "b": "resident"}
        bench.use("a")
        assert bench.states() == {"a": "resident", "b": "offloaded"}

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
        bench.residency.acquire("b")
        assert len(bench.settle()) == 1

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

    def test_on_a_cpu_the_models_count(self) -> None:
        """On a CPU the interpreter is no part of the budget, only what the models hold."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", budget_bytes=200))
        bench.device.on_device["the interpreter"] = 500
        bench.use("a", "b")
        assert bench.states() == {"a": "resident", "b": "resident"}

    def test_on_a_cpu_only_dropping_frees_ram(self) -> None:
        """On a CPU that is short of RAM, models are dropped: offloaded ones first."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(kind="cpu", total_bytes=250, budget_bytes=150))
        bench.use("a", "b")
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "absent"}
        bench.use("c")
        assert ("drop", "a") in bench.moves
        assert bench.states() == {"a": "absent", "b": "offloaded", "c": "resident"}

    def test_on_a_cpu_offloaded_weights_need_no_second_place(self) -> None:
        """Restoring on a CPU takes the room that the offloaded weights leave."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(kind="cpu", total_bytes=220, budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.moves[-2:] == [("offload", "b"), ("restore", "a")]


class TestStart:
    """The models that are to be there from the start."""

    def test_the_first_come_first(self) -> None:
        """They come in their order, whatever the catalogue's, and none of them leaves for another."""
        bench = Bench({"a": 100, "b": 100, "c": 40}, FakeDevice(budget_bytes=150))
        bench.residency.preload(["b", "a", "c"])
        assert bench.residency.preloading == ["b", "a", "c"]
        refusals = []
        while decisions := bench.plan():
            for decision in decisions:
                (bench.finish if isinstance(decision, Move) else refusals.append)(decision)
        assert bench.moves == [("load", "b"), ("load", "c")]
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

    def test_unload(self) -> None:
        """Unloaded by hand it is not waited for any more; where that is refused, it is."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.preload(["a", "b"])
        bench.residency.acquire("b")
        bench.residency.ask_unload("a")
        with pytest.raises(ModelBusyError):
            bench.residency.ask_unload("b")
        assert bench.residency.preloading == ["b"]


class TestFiles:
    """Weights that are here, elsewhere, or not to be had."""

    def test_are_looked_at_before_a_load(self) -> None:
        """A model's files are looked at whenever it begins to be wanted, once, and never for a restore."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        bench.residency.acquire("a")
        assert bench.residency.plan() == []
        bench.settle()
        assert bench.looks == 1
        bench.residency.release("a", None)
        bench.residency.release("a", 0)
        bench.settle()
        bench.use("a")
        assert bench.looks == 1
        bench.residency.ask_unload("a")
        bench.settle()
        bench.use("a")
        assert bench.looks == 2

    def test_are_looked_at_now_and_then(self) -> None:
        """What comes and goes by itself is noticed, though nothing moves and nobody asks."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("b")
        looks = bench.looks
        bench.problems["a"] = "its weights are gone"
        bench.clock.advance(LOOK_S)
        bench.see_to_files()
        assert bench.states() == {"a": "unavailable", "b": "resident"}
        assert bench.looks == looks + 1
        bench.see_to_files()
        assert bench.looks == looks + 1

    def test_are_fetched_beside_the_moves(self) -> None:
        """One model is fetched at a time, the longest wanted first; others are loaded meanwhile."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.remote = {"a", "b"}
        for model in "bac":
            bench.residency.acquire(model)
        bench.settle()
        assert bench.fetching == ["b"]
        assert bench.states() == {"a": "absent", "b": "loading", "c": "resident"}
        assert bench.fetched("b") is None
        bench.settle()
        assert bench.fetching == ["a"]
        assert bench.fetched("a") is None
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
        bench.fetched("b")
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
        assert bench.fetching == ["a"]
        bench.fetched("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_cannot_be_fetched(self) -> None:
        """Who waits is refused, and why is told until something changes; what arrived in part changes nothing."""
        bench = Bench({"a": 100})
        bench.remote = {"a"}
        bench.residency.acquire("a")
        bench.settle()
        refusal = bench.fetched("a", JobError("model_unavailable", "the hub is out of reach"))
        assert refusal is not None
        assert (refusal.code, refusal.message) == ("model_unavailable", "the hub is out of reach")
        bench.residency.abandon("a")
        bench.stamps["a"] = "half of it"
        for _ in range(2):
            bench.clock.advance(LOOK_S)
            bench.settle()
            assert (bench.model("a").state, bench.model("a").detail) == ("absent", "the hub is out of reach")
        bench.stamps["a"] = "all of it, copied in by hand"
        bench.clock.advance(LOOK_S)
        bench.settle()
        assert bench.model("a").detail == ""


class TestHost:
    """What happens in host RAM."""

    def test_over_the_host_budget_the_oldest_is_dropped(self) -> None:
        """Where host RAM has no room for one more, the least recently used offloaded model gives up its place."""
        bench = Bench({"a": 100, "b": 100, "c": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b", "c")
        assert bench.moves[-3:] == [("drop", "a"), ("offload", "b"), ("load", "c")]

    def test_the_oldest_is_not_put_before_others(self) -> None:
        """A model that leaves the device and is the least recently used of all is dropped where host RAM is full."""
        device = FakeDevice(budget_bytes=250, host_budget_bytes=150)
        bench = Bench({"a": 100, "b": 100, "c": 200}, device)
        bench.use("a")
        bench.use("b", keep_alive_s=0)
        bench.settle()
        bench.use("c")
        assert bench.moves[-2:] == [("drop", "a"), ("load", "c")]

    def test_larger_in_host_ram_than_on_the_device(self) -> None:
        """A model that turns out to be over the host's budget when it has got there is dropped."""
        bench = Bench({"a": 100}, FakeDevice(host_budget_bytes=150))
        bench.use("a", keep_alive_s=0)
        bench.sizes["a"] = 200
        bench.settle()
        assert bench.moves[-2:] == [("offload", "a"), ("drop", "a")]

    def test_what_is_wanted_keeps_its_place(self) -> None:
        """A model that waits to be restored is not dropped to make host room for the one that leaves for it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150, host_budget_bytes=150))
        bench.use("a", "b")
        bench.residency.ask_load("a")
        bench.settle()
        assert bench.moves[-2:] == [("drop", "b"), ("restore", "a")]

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

    def test_offloaded_bytes_are_told(self) -> None:
        """The host's figures say what offloaded models hold of it."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b")
        assert bench.residency.host().offloaded_bytes == 100
        assert bench.model("a").host_bytes == 100


class TestIdle:
    """When models that nobody uses leave."""

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
        bench.residency.cleanup.start()
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

    def test_keep_alive_is_for_those_to_say_that_spoke(self) -> None:
        """A request that ends before it has spoken changes nothing about how long the model stays."""
        bench = Bench({"a": 100}, idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a", keep_alive_s=-1)
        bench.residency.acquire("a")
        bench.residency.abandon("a")
        bench.clock.advance(1_000)
        bench.settle()
        assert (bench.states(), bench.model("a").keep_alive_s) == ({"a": "resident"}, -1)

    def test_asked_for_again_after_keep_alive_zero(self) -> None:
        """A load by hand is not undone by what a request said before it."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.ask_load("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_pinned(self) -> None:
        """A pinned model is evicted for nobody and at no time, until it is let go."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150), idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a")
        bench.residency.pin("a", True)
        bench.clock.advance(1_000)
        bench.settle()
        assert not bench.residency.room.make()
        bench.residency.acquire("b")
        (refusal,) = bench.settle()
        assert "a 0 MiB (pinned)" in refusal.message
        assert refusal.retry_after_s == FULL_RETRY_S
        assert bench.model("a").pinned
        bench.residency.pin("a", False)
        assert bench.settle() == []
        assert bench.states()["b"] == "resident"


class TestUnload:
    """Unloading by hand."""

    @pytest.mark.parametrize("offloaded", [False, True])
    def test_gives_everything_up(self, *, offloaded: bool) -> None:
        """A model is dropped from wherever it is, pinned or not."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0 if offloaded else None)
        bench.settle()
        bench.residency.pin("a", True)
        bench.residency.ask_unload("a")
        bench.settle()
        assert bench.states() == {"a": "absent"}
        assert bench.moves[-1] == ("drop", "a")
        assert bench.model("a").bytes == {}

    def test_refused_while_busy(self) -> None:
        """A model with a request, queued or running, is not unloaded."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        with pytest.raises(ModelBusyError, match="a has 1 request"):
            bench.residency.ask_unload("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_prevented_by_a_request(self) -> None:
        """A request that comes between the word and the deed keeps its model."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a")
        bench.residency.acquire("b")
        move = bench.next_move()
        bench.residency.ask_unload("a")
        bench.residency.acquire("a")
        bench.finish(move)
        bench.settle()
        assert bench.moves == [("load", "a"), ("load", "b")]

    def test_of_a_model_that_is_loading(self) -> None:
        """A model that nobody needs any more is dropped when its load has ended."""
        bench = Bench({"a": 100})
        bench.residency.ask_load("a")
        move = bench.next_move()
        bench.residency.ask_unload("a")
        bench.finish(move)
        bench.settle()
        assert bench.moves == [("load", "a"), ("drop", "a")]

    def test_of_an_absent_model(self) -> None:
        """There is nothing to do."""
        bench = Bench({"a": 100})
        bench.residency.ask_unload("a")
        assert bench.plan() == []

    def test_request_during_the_move_away(self) -> None:
        """A model that is being offloaded counts as gone at once, and comes back for a request that came meanwhile."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        move = bench.next_move()
        assert move.kind == "offload"
        assert bench.states() == {"a": "offloaded"}
        bench.residency.acquire("a")
        bench.finish(move)
        bench.settle()
        assert bench.moves[-1] == ("restore", "a")


class TestCleanup:
    """Passes and their figures."""

    def test_figures(self) -> None:
        """A pass tells what it looked at, what it unloaded, and the bytes that the probe measured before and after."""
        bench = Bench({"a": 100, "b": 70, "c": 30}, idle_timeout_s=10)
        bench.use("a", "b")
        bench.clock.advance(9)
        bench.residency.cleanup.start()
        bench.settle()
        assert not bench.residency.cleanup.under_way
        result = bench.residency.cleanup.last
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (170, 70)
        assert (result.models_checked, result.models_unloaded) == (["a", "b"], ["a"])
        assert result.timestamp == WALL + bench.clock.now

    def test_result_comes_with_the_last_move(self) -> None:
        """Until its moves have ended a pass is under way and the result is the one before."""
        bench = Bench({"a": 100}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.cleanup.start()
        assert bench.residency.cleanup.under_way
        move = bench.next_move()
        assert bench.residency.cleanup.under_way
        assert bench.residency.cleanup.last is None
        bench.finish(move)
        assert bench.plan() == []
        assert not bench.residency.cleanup.under_way
        assert bench.residency.cleanup.last is not None

    def test_is_not_muddled_with_a_load(self) -> None:
        """A pass asked for during a load begins behind it: its figures are its own."""
        bench = Bench({"a": 100, "b": 50}, idle_timeout_s=1)
        bench.use("a")
        bench.clock.advance(1)
        bench.residency.acquire("b")
        move = bench.next_move()
        bench.residency.cleanup.start()
        bench.finish(move)
        bench.settle()
        result = bench.residency.cleanup.last
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (150, 50)

    def test_with_nothing_to_do(self) -> None:
        """A pass that finds nothing ends at once and says so."""
        bench = Bench({"a": 100})
        bench.residency.cleanup.start()
        assert bench.plan() == []
        result = bench.residency.cleanup.last
        assert result is not None
        assert result.models_checked == []

    def test_an_unload_by_hand_is_not_the_passes(self) -> None:
        """A pass's figures are its own: what is unloaded by hand meanwhile leaves behind it."""
        bench = Bench({"a": 100, "b": 70, "c": 30}, idle_timeout_s=10)
        bench.use("a", "b", "c")
        bench.clock.advance(9)
        bench.residency.cleanup.start()
        move = bench.next_move()
        bench.residency.ask_unload("c")
        bench.finish(move)
        bench.settle()
        result = bench.residency.cleanup.last
        assert result is not None
        assert (result.vram_before_bytes, result.vram_after_bytes) == (200, 30)
        assert (result.models_unloaded, result.models_dropped) == (["a", "b"], [])
        assert bench.moves[-3:] == [("offload", "a"), ("offload", "b"), ("drop", "c")]

    def test_what_is_dropped_is_told_from_what_is_offloaded(self) -> None:
        """A model whose time in host RAM is over left no device."""
        bench = Bench({"a": 100, "b": 100}, idle_timeout_s=10, host_idle_timeout_s=30)
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.use("b")
        bench.clock.advance(40)
        bench.residency.cleanup.start()
        bench.settle()
        result = bench.residency.cleanup.last
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
        bench.residency.cleanup.start()
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
        result = bench.residency.cleanup.last
        assert result is not None
        assert result.models_unloaded == ["a", "b"]
        assert bench.states() == {"a": "absent", "b": "offloaded"}


class TestTrouble:
    """Moves that fail, and memory that runs out."""

    def test_failed_load(self) -> None:
        """A load that fails leaves the model absent, its requests fail with the reason, and the next may try again."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        refusal = bench.residency.failed(failed(bench.next_move(), "absent", message="a file vanished"))
        assert refusal is not None
        assert (refusal.code, refusal.message) == ("model_unavailable", "a file vanished")
        bench.residency.abandon("a")
        assert bench.plan() == []
        bench.clock.advance(1_000)
        bench.settle()
        assert (bench.model("a").state, bench.model("a").detail) == ("absent", "a file vanished")
        bench.residency.acquire("a")
        move = bench.next_move()
        assert (bench.model("a").state, bench.model("a").detail) == ("loading", "a file vanished")
        bench.finish(move)
        assert bench.model("a").detail == ""

    def test_failed_load_of_other_files(self) -> None:
        """What was wrong with a model's files is forgotten when they change."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        bench.residency.failed(failed(bench.next_move(), "absent", message="a file is damaged"))
        bench.residency.abandon("a")
        bench.stamps["a"] = "mended"
        bench.clock.advance(LOOK_S)
        bench.settle()
        assert bench.model("a").detail == ""

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

    def test_failed_restore(self) -> None:
        """A restore that fails leaves the model offloaded, with its figures."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.acquire("a")
        assert bench.residency.failed(failed(bench.next_move(), "offloaded")) is not None
        assert bench.states() == {"a": "offloaded"}
        assert bench.model("a").host_bytes == 100

    def test_out_of_memory_is_tried_once_more(self) -> None:
        """A load that ran out of memory evicts what is idle and is tried once more, and once only."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("b")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("a")
        assert bench.residency.failed(failed(bench.next_move(), "absent", "insufficient_vram")) is None
        move = bench.next_move()
        assert move == Move(model="b", kind="offload")
        bench.finish(move)
        bench.residency.release("c", None)
        refusal = bench.residency.failed(failed(bench.next_move(), "absent", "insufficient_vram"))
        assert refusal is not None
        assert refusal.code == "insufficient_vram"

    def test_out_of_memory_is_tried_once_more_for_each(self) -> None:
        """A second try that somebody else used up, and gave up on, is not missing to the next who asks."""
        bench = Bench({"a": 100, "b": 100})
        for _ in range(2):
            bench.use("b")
            bench.residency.acquire("a")
            assert bench.residency.failed(failed(bench.next_move(), "absent", "insufficient_vram")) is None
            bench.residency.abandon("a")
            bench.settle()
            assert bench.states() == {"a": "absent", "b": "offloaded"}

    def test_out_of_memory_with_nothing_idle(self) -> None:
        """Where nothing can be evicted the load fails at once."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        assert bench.residency.failed(failed(bench.next_move(), "absent", "insufficient_vram")) is not None

    def test_failed_offload(self) -> None:
        """An offload that fails gave the model up: it is absent, holds nothing, and nobody has to hear of it."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        move = bench.next_move()
        bench.device.place("a", "absent", 0)
        assert bench.residency.failed(failed(move, "absent")) is None
        assert bench.states() == {"a": "absent"}
        assert bench.model("a").bytes == {}
        bench.use("a")
        assert bench.moves[-1] == ("load", "a")

    def test_make_room(self) -> None:
        """For a step that ran out of memory every idle model leaves, the least recently used first."""
        bench = Bench({"a": 100, "b": 100, "c": 100, "d": 100})
        bench.use("b", "a", "c")
        bench.residency.acquire("d")
        bench.settle()
        assert bench.residency.room.make()
        assert bench.residency.room.making
        bench.settle()
        assert not bench.residency.room.making
        assert bench.moves[-3:] == [("offload", "b"), ("offload", "a"), ("offload", "c")]
        assert bench.states()["d"] == "resident"
        assert not bench.residency.room.make()

    def test_make_room_during_a_load(self) -> None:
        """Nobody is to wait for a load that is in flight; what is idle leaves behind it."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("a")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("b")
        move = bench.next_move()
        assert bench.residency.room.make()
        assert not bench.residency.room.making
        bench.finish(move)
        assert bench.residency.room.making
        bench.settle()
        assert bench.states() == {"a": "offloaded", "b": "resident", "c": "resident"}

    def test_broken_engine(self) -> None:
        """A model whose engine broke is dropped, whoever waits for it, and comes back for them."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("b")
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.replace("a")
        assert bench.states()["a"] == "loading"
        bench.settle()
        assert bench.moves[-2:] == [("drop", "a"), ("load", "a")]
        assert bench.states()["a"] == "resident"
        bench.residency.release("a", None)
        bench.residency.replace("a")
        assert bench.states()["a"] == "absent"
        bench.settle()
        assert bench.moves[-1] == ("drop", "a")

    def test_make_room_spares_who_became_busy(self) -> None:
        """A model that gets a request before its turn to leave came stays."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a", "b")
        bench.residency.room.make()
        move = bench.next_move()
        bench.residency.acquire("b")
        bench.finish(move)
        bench.settle()
        assert bench.moves == [("load", "a"), ("load", "b"), ("offload", "a")]

    def test_release_without_reference(self) -> None:
        """References never go below zero: a release too many is a mistake that is said."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="no reference"):
            bench.residency.release("a", None)

    def test_report_of_another_move(self) -> None:
        """A report that does not belong to the move in flight is a mistake that is said."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="not in flight"):
            bench.residency.moved(done(Move(model="a", kind="load"), bench.device.place("a", "resident", 1)))
