"""Which model is where: what is asked for, and what came of it."""

import pytest

from gpu_worker.residency.manager import ModelBusyError
from gpu_worker.residency.models import ModelState, Transition
from gpu_worker.residency.policy import FULL_RETRY_S
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench, done, failed


class TestComing:
    """How a model comes to the device."""

    def test_first_request_loads(self) -> None:
        """A request's model is loaded, is "loading" meanwhile, and its measured bytes are told afterwards."""
        bench = Bench({"a": 100})
        assert bench.states() == {"a": "absent"}
        bench.residency.acquire("a")
        move = bench.next_transition()
        assert move == Transition("a", "load")
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
        move = bench.next_transition()
        assert bench.advance() == []
        bench.finish(move)
        assert bench.next_transition() == Transition("b", "load")

    def test_asked_for(self) -> None:
        """A model is loaded because somebody asked, without a request; asking again changes nothing."""
        bench = Bench({"a": 100})
        bench.residency.load("a")
        bench.residency.load("a")
        bench.settle()
        bench.residency.load("a")
        assert bench.advance() == []
        assert bench.transitions == [("load", "a")]

    def test_restores_what_was_offloaded(self) -> None:
        """An offloaded model comes back from host RAM, not from disk."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.transitions == [
            ("load", "a"),
            ("offload", "a"),
            ("load", "b"),
            ("offload", "b"),
            ("restore", "a"),
        ]

    def test_asked_for_again_after_keep_alive_zero(self) -> None:
        """A load by hand is not undone by what a request said before it."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.load("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_offloaded_bytes_are_told(self) -> None:
        """In all, and of each model."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b")
        assert bench.residency.offloaded_bytes() == 100
        assert bench.model("a").host_bytes == 100


class TestStaying:
    """How a model is kept."""

    def test_pinned(self) -> None:
        """A pinned model is evicted for nobody and at no time, until it is let go."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150), idle_timeout_s=10, cleanup_interval_s=1)
        bench.use("a")
        bench.residency.pin("a", True)
        bench.clock.advance(1_000)
        bench.settle()
        assert not bench.residency.evict_idle()
        bench.residency.acquire("b")
        (refusal,) = bench.settle()
        assert "a 0 MiB (pinned)" in refusal.message
        assert refusal.retry_after_s == FULL_RETRY_S
        assert bench.model("a").pinned
        bench.residency.pin("a", False)
        assert bench.settle() == []
        assert bench.states()["b"] == "resident"

    def test_release_without_reference(self) -> None:
        """References never go below zero: a release too many is a mistake that is said."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="no reference"):
            bench.residency.release("a", None)


class TestUnload:
    """Unloading by hand."""

    @pytest.mark.parametrize("offloaded", [False, True])
    def test_gives_everything_up(self, *, offloaded: bool) -> None:
        """A model is dropped from wherever it is, pinned or not."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0 if offloaded else None)
        bench.settle()
        bench.residency.pin("a", True)
        bench.residency.unload("a")
        bench.settle()
        assert bench.states() == {"a": "absent"}
        assert bench.transitions[-1] == ("drop", "a")
        assert bench.model("a").bytes == {}

    def test_refused_while_busy(self) -> None:
        """A model with a request, queued or running, is not unloaded."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        with pytest.raises(ModelBusyError, match="a has 1 request"):
            bench.residency.unload("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_prevented_by_a_request(self) -> None:
        """A request that comes between the word and the deed keeps its model."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a")
        bench.residency.acquire("b")
        move = bench.next_transition()
        bench.residency.unload("a")
        bench.residency.acquire("a")
        bench.finish(move)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("load", "b")]

    def test_of_a_model_that_is_loading(self) -> None:
        """A model that nobody needs any more is dropped when its load has ended."""
        bench = Bench({"a": 100})
        bench.residency.load("a")
        move = bench.next_transition()
        bench.residency.unload("a")
        bench.finish(move)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("drop", "a")]

    def test_of_an_absent_model(self) -> None:
        """There is nothing to do."""
        bench = Bench({"a": 100})
        bench.residency.unload("a")
        assert bench.advance() == []

    def test_request_during_the_move_away(self) -> None:
        """A model that is being offloaded counts as gone at once, and comes back for a request that came meanwhile."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        move = bench.next_transition()
        assert move.kind == "offload"
        assert bench.states() == {"a": "offloaded"}
        bench.residency.acquire("a")
        bench.finish(move)
        bench.settle()
        assert bench.transitions[-1] == ("restore", "a")

    def test_of_a_model_of_the_start(self) -> None:
        """Unloaded by hand it is not waited for any more; where that is refused, it is."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.preload(["a", "b"])
        bench.residency.acquire("b")
        bench.residency.unload("a")
        with pytest.raises(ModelBusyError):
            bench.residency.unload("b")
        assert bench.residency.preloading == ["b"]


class TestTrouble:
    """Moves that fail, and engines that break."""

    def test_failed_load(self) -> None:
        """A load that fails leaves the model absent, its requests fail with the reason, and the next may try again."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        refusal = bench.fail_next(ModelState.ABSENT, message="a file vanished")
        assert refusal is not None
        assert (refusal.code, refusal.message) == ("model_unavailable", "a file vanished")
        bench.residency.abandon("a")
        assert bench.advance() == []
        bench.clock.advance(1_000)
        bench.settle()
        assert (bench.model("a").state, bench.model("a").detail) == ("absent", "a file vanished")
        bench.residency.acquire("a")
        move = bench.next_transition()
        assert (bench.model("a").state, bench.model("a").detail) == ("loading", "a file vanished")
        bench.finish(move)
        assert bench.model("a").detail == ""

    def test_failed_restore(self) -> None:
        """A restore that fails leaves the model offloaded, with its figures."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.OFFLOADED) is not None
        assert bench.states() == {"a": "offloaded"}
        assert bench.model("a").host_bytes == 100

    def test_out_of_memory_is_tried_once_more(self) -> None:
        """A load that ran out of memory evicts what is idle and is tried once more, and once only."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("b")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is None
        move = bench.next_transition()
        assert move == Transition("b", "offload")
        bench.finish(move)
        bench.residency.release("c", None)
        refusal = bench.fail_next(ModelState.ABSENT, "insufficient_vram")
        assert refusal is not None
        assert refusal.code == "insufficient_vram"

    def test_out_of_memory_is_tried_once_more_for_each(self) -> None:
        """A second try that somebody else used up, and gave up on, is not missing to the next who asks."""
        bench = Bench({"a": 100, "b": 100})
        for _ in range(2):
            bench.use("b")
            bench.residency.acquire("a")
            assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is None
            bench.residency.abandon("a")
            bench.settle()
            assert bench.states() == {"a": "absent", "b": "offloaded"}

    def test_out_of_memory_with_nothing_idle(self) -> None:
        """Where nothing can be evicted the load fails at once."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is not None

    def test_failed_offload(self) -> None:
        """An offload that fails gave the model up: it is absent, holds nothing, and nobody has to hear of it."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        move = bench.next_transition()
        bench.device.put("a", ModelState.ABSENT, 0)
        assert bench.residency.handle(failed(move, ModelState.ABSENT)) is None
        assert bench.states() == {"a": "absent"}
        assert bench.model("a").bytes == {}
        bench.use("a")
        assert bench.transitions[-1] == ("load", "a")

    def test_broken_engine(self) -> None:
        """A model whose engine broke is dropped, whoever waits for it, and comes back for them."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("b")
        bench.residency.acquire("a")
        bench.settle()
        bench.residency.replace_engine("a")
        assert bench.states()["a"] == "loading"
        bench.settle()
        assert bench.transitions[-2:] == [("drop", "a"), ("load", "a")]
        assert bench.states()["a"] == "resident"
        bench.residency.release("a", None)
        bench.residency.replace_engine("a")
        assert bench.states()["a"] == "absent"
        bench.settle()
        assert bench.transitions[-1] == ("drop", "a")

    def test_report_of_another_move(self) -> None:
        """A report that does not belong to the move in flight is a mistake that is said."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="not in flight"):
            bench.residency.handle(done(Transition("a", "load"), bench.device.put("a", ModelState.RESIDENT, 1)))
