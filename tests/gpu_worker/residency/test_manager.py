"""Residency at its facade: requests, admin calls, transitions that fail."""

import pytest

from gpu_worker.residency.manager import ModelBusyError
from gpu_worker.residency.models import ModelState, Transition
from gpu_worker.residency.policy import FULL_RETRY_S
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.residency.bench import Bench, done, failed


class TestLoading:
    """Becoming resident."""

    def test_first_request_loads(self) -> None:
        """A request loads its model: "loading", then "resident" with its measured bytes."""
        bench = Bench({"a": 100})
        assert bench.states() == {"a": "absent"}
        bench.residency.acquire("a")
        transition = bench.next_transition()
        assert transition == Transition("a", "load")
        assert bench.states() == {"a": "loading"}
        bench.finish(transition)
        assert bench.states() == {"a": "resident"}
        assert bench.model("a").bytes == {"weights": 100}
        assert bench.model("a").references == 1

    def test_one_transition_at_a_time(self) -> None:
        """No second transition starts beside the one in flight."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.acquire("a")
        bench.residency.acquire("b")
        transition = bench.next_transition()
        assert bench.advance() == []
        bench.finish(transition)
        assert bench.next_transition() == Transition("b", "load")

    def test_admin_load(self) -> None:
        """An admin's load needs no request; a second one changes nothing."""
        bench = Bench({"a": 100})
        bench.residency.load("a")
        bench.residency.load("a")
        bench.settle()
        bench.residency.load("a")
        assert bench.advance() == []
        assert bench.transitions == [("load", "a")]

    def test_restores_what_was_offloaded(self) -> None:
        """An offloaded model is restored from host RAM, not loaded from disk."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b", "a")
        assert bench.transitions == [
            ("load", "a"),
            ("offload", "a"),
            ("load", "b"),
            ("offload", "b"),
            ("restore", "a"),
        ]

    def test_admin_load_after_keep_alive_zero(self) -> None:
        """An admin's load overrides an earlier keep_alive 0."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.load("a")
        bench.settle()
        assert bench.states() == {"a": "resident"}

    def test_offloaded_bytes(self) -> None:
        """Offloaded bytes are reported in total and for each model."""
        bench = Bench({"a": 100, "b": 100}, FakeDevice(budget_bytes=150))
        bench.use("a", "b")
        assert bench.residency.offloaded_bytes() == 100
        assert bench.model("a").host_bytes == 100


class TestCost:
    """The cost of a turn of the loop while nothing changes."""

    def test_no_reading_without_a_change(self) -> None:
        """Memory is read after a change and not again before the next one: a reading of NVML takes a millisecond."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a")
        bench.settle()
        readings = bench.device.readings
        bench.residency.acquire("a")
        for _ in range(3):
            assert bench.advance() == []
        assert bench.device.readings == readings
        bench.residency.release("a", None)
        assert bench.advance() == []
        assert bench.device.readings == readings + 1
        assert bench.advance() == []
        assert bench.device.readings == readings + 1


class TestPins:
    """Pins and references."""

    def test_pinned(self) -> None:
        """A pinned model is never evicted until it is unpinned."""
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
        """A release without a reference raises."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="no reference"):
            bench.residency.release("a", None)


class TestUnload:
    """An admin's unload."""

    @pytest.mark.parametrize("offloaded", [False, True])
    def test_drops_from_anywhere(self, *, offloaded: bool) -> None:
        """An unload drops the model from the device or host RAM, pinned or not."""
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
        """A request that arrives before the drop begins prevents it."""
        bench = Bench({"a": 100, "b": 100})
        bench.use("a")
        bench.residency.acquire("b")
        transition = bench.next_transition()
        bench.residency.unload("a")
        bench.residency.acquire("a")
        bench.finish(transition)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("load", "b")]

    def test_of_a_loading_model(self) -> None:
        """A loading model is dropped once its load has ended."""
        bench = Bench({"a": 100})
        bench.residency.load("a")
        transition = bench.next_transition()
        bench.residency.unload("a")
        bench.finish(transition)
        bench.settle()
        assert bench.transitions == [("load", "a"), ("drop", "a")]

    def test_of_an_absent_model(self) -> None:
        """An unload of an absent model does nothing."""
        bench = Bench({"a": 100})
        bench.residency.unload("a")
        assert bench.advance() == []

    def test_request_during_an_offload(self) -> None:
        """A model counts as gone from the start of its offload; a request meanwhile restores it."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        transition = bench.next_transition()
        assert transition.kind == "offload"
        assert bench.states() == {"a": "offloaded"}
        bench.residency.acquire("a")
        bench.finish(transition)
        bench.settle()
        assert bench.transitions[-1] == ("restore", "a")

    def test_of_a_preloaded_model(self) -> None:
        """An unload ends the start's wait for a model; a refused unload does not."""
        bench = Bench({"a": 100, "b": 100})
        bench.residency.preload(["a", "b"])
        bench.residency.acquire("b")
        bench.residency.unload("a")
        with pytest.raises(ModelBusyError):
            bench.residency.unload("b")
        assert bench.residency.preloading == ["b"]


class TestFailures:
    """Failing transitions and broken engines."""

    def test_failed_load(self) -> None:
        """A failed load leaves the model absent and refuses its requests; the next request tries again."""
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
        transition = bench.next_transition()
        assert (bench.model("a").state, bench.model("a").detail) == ("loading", "a file vanished")
        bench.finish(transition)
        assert bench.model("a").detail == ""

    def test_failed_restore(self) -> None:
        """A failed restore leaves the model offloaded, with its figures."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        bench.settle()
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.OFFLOADED) is not None
        assert bench.states() == {"a": "offloaded"}
        assert bench.model("a").host_bytes == 100

    def test_out_of_memory_is_tried_once_more(self) -> None:
        """A load that runs out of memory evicts idle models and is tried once more, not twice."""
        bench = Bench({"a": 100, "b": 100, "c": 100})
        bench.use("b")
        bench.residency.acquire("c")
        bench.settle()
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is None
        transition = bench.next_transition()
        assert transition == Transition("b", "offload")
        bench.finish(transition)
        bench.residency.release("c", None)
        refusal = bench.fail_next(ModelState.ABSENT, "insufficient_vram")
        assert refusal is not None
        assert refusal.code == "insufficient_vram"

    def test_out_of_memory_is_tried_once_more_for_each(self) -> None:
        """The second try is granted anew for the next request."""
        bench = Bench({"a": 100, "b": 100})
        for _ in range(2):
            bench.use("b")
            bench.residency.acquire("a")
            assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is None
            bench.residency.abandon("a")
            bench.settle()
            assert bench.states() == {"a": "absent", "b": "offloaded"}

    def test_out_of_memory_with_nothing_idle(self) -> None:
        """If nothing is idle, the load fails at once."""
        bench = Bench({"a": 100})
        bench.residency.acquire("a")
        assert bench.fail_next(ModelState.ABSENT, "insufficient_vram") is not None

    def test_failed_offload(self) -> None:
        """A failed offload leaves the model absent and refuses nothing."""
        bench = Bench({"a": 100})
        bench.use("a", keep_alive_s=0)
        transition = bench.next_transition()
        bench.device.put("a", ModelState.ABSENT, 0)
        assert bench.residency.handle(failed(transition, ModelState.ABSENT)) is None
        assert bench.states() == {"a": "absent"}
        assert bench.model("a").bytes == {}
        bench.use("a")
        assert bench.transitions[-1] == ("load", "a")

    def test_broken_engine(self) -> None:
        """A broken engine is dropped even if requests wait, and the model is loaded for them."""
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

    def test_report_of_another_transition(self) -> None:
        """A report of another transition than the one in flight raises."""
        bench = Bench({"a": 100})
        with pytest.raises(ValueError, match="not in flight"):
            bench.residency.handle(done(Transition("a", "load"), bench.device.put("a", ModelState.RESIDENT, 1)))
