"""Admin calls for models: load, unload, pin and clean up by hand."""

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.residency.manager import FILE_CHECK_S
from shared.protocol import (
    Cleanup,
    LoadModel,
    PinModel,
    UnloadModel,
)
from tests.gpu_worker.fakes import WALL, FakeDevice, a_spec
from tests.gpu_worker.worker_bench import OTHER, MakeBench, WorkerBench


class TestLoad:
    """LoadModel."""

    def test_answered_when_resident(self, bench: WorkerBench) -> None:
        """The answer comes when the model is resident; the answer for a resident model comes at once."""
        bench.load_gate.clear()
        bench.call("c", LoadModel(model="m"))
        bench.turn(3)
        assert bench.messages("c") == []
        bench.load_gate.set()
        bench.settle()
        (reply,) = bench.messages("c")
        assert (reply.model.id, reply.model.state, reply.model.bytes) == ("m", "resident", {"weights": 100})
        assert bench.result_of(LoadModel(model="m"), call_id="d").model.state == "resident"
        assert len(bench.opened) == 1

    def test_two_calls(self, bench: WorkerBench) -> None:
        """Two calls for one load are both answered."""
        bench.call("c", LoadModel(model="m"))
        bench.call("d", LoadModel(model="m"))
        bench.settle()
        assert bench.kinds("c") == bench.kinds("d") == ["Reply"]

    def test_cancelled(self, bench: WorkerBench) -> None:
        """A cancelled call gets no answer; the load goes on, and other calls for it are answered."""
        bench.load_gate.clear()
        for call_id in ("c", "d"):
            bench.call(call_id, LoadModel(model="m"))
        bench.turn(2)
        bench.cancel("c", peer=OTHER)
        bench.cancel("d")
        bench.load_gate.set()
        bench.settle()
        assert (bench.kinds("c"), bench.messages("d")) == (["Reply"], [])
        assert bench.states() == {"m": "resident"}

    def test_fails(self, bench: WorkerBench) -> None:
        """The answer has the error of the load; the next call tries again."""
        bench.open_errors["m"] = [JobError("model_unavailable", "a shard is damaged")]
        failed = bench.result_of(LoadModel(model="m"))
        assert (failed.code, failed.message) == ("model_unavailable", "a shard is damaged")
        assert bench.result_of(LoadModel(model="m"), call_id="d").model.state == "resident"

    def test_larger_than_estimated(self, make_bench: MakeBench) -> None:
        """A model that turns out too large for the budget is offloaded again, but the call has its answer."""
        bench = make_bench({"m": 100}, specs=[a_spec("m", 10)], device=FakeDevice(budget_bytes=50))
        assert bench.result_of(LoadModel(model="m")).model.state == "resident"
        assert bench.states() == {"m": "offloaded"}

    def test_for_a_while(self, bench: WorkerBench) -> None:
        """A load says how long the model stays; a later one without it means: as configured."""
        assert bench.result_of(LoadModel(model="m", keep_alive_s=60.0)).model.keep_alive_s == 60.0
        assert bench.result_of(LoadModel(model="m")).model.keep_alive_s is None

    def test_unknown_and_unavailable(self, bench: WorkerBench) -> None:
        """A model that cannot be loaded fails the call like a request."""
        failed = bench.result_of(LoadModel(model="x"))
        assert (failed.code, failed.param) == ("model_not_found", "model")
        bench.files.problems["m"] = "its weights are not there"
        failed = bench.result_of(LoadModel(model="m"), call_id="d")
        assert failed.code == "model_unavailable"
        assert "its weights are not there" in failed.message

    def test_overtaken_by_an_unload(self, bench: WorkerBench) -> None:
        """Of a load and a later unload the unload wins, and the load fails."""
        bench.load_gate.clear()
        bench.call("c", LoadModel(model="m"))
        bench.turn(2)
        bench.call("d", UnloadModel(model="m"))
        bench.turn()
        assert [message.code for message in bench.messages("c")] == ["model_busy"]
        assert bench.messages("d") == []
        bench.load_gate.set()
        bench.settle()
        assert [message.model.state for message in bench.messages("d")] == ["absent"]
        assert bench.states() == {"m": "absent"}


class TestUnload:
    """UnloadModel."""

    def test_answered_when_absent(self, bench: WorkerBench) -> None:
        """The model leaves the device and host RAM; unloading an absent model succeeds."""
        bench.result_of(LoadModel(model="m"))
        reply = bench.result_of(UnloadModel(model="m"), call_id="d")
        assert (reply.model.state, reply.model.bytes) == ("absent", {})
        assert bench.device.on_device == {}
        assert bench.result_of(UnloadModel(model="m"), call_id="e").model.state == "absent"

    def test_unavailable(self, bench: WorkerBench) -> None:
        """A model without files on the disk counts as unloaded, with the state "unavailable"."""
        bench.files.problems["m"] = "gone"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        assert bench.result_of(UnloadModel(model="m"), call_id="d").model.state == "unavailable"

    def test_busy(self, bench: WorkerBench) -> None:
        """A model with a request is not unloaded, and the request goes on."""
        bench.speak("r", "a b", credit=1)
        failed = bench.result_of(UnloadModel(model="m"))
        assert (failed.code, failed.param) == ("model_busy", "model")
        bench.credit("r", 1)
        bench.settle()
        assert bench.words("r") == "a b"

    def test_overtaken_by_a_request(self, bench: WorkerBench) -> None:
        """A request that comes before the drop begins prevents it, and the call fails."""
        bench.result_of(LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.speak("r", "a b")
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]
        assert bench.words("r") == "a b"
        assert len(bench.opened) == 1

    def test_overtaken_by_a_cancelled_request(self, bench: WorkerBench) -> None:
        """A request prevents the drop even if it is cancelled in the same turn."""
        bench.result_of(LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.speak("r", "a b")
        bench.cancel("r")
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]

    def test_request_during_the_drop(self, bench: WorkerBench) -> None:
        """A request that comes during the drop waits for a new load; the call is answered."""
        bench.result_of(LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.load_gate.clear()
        bench.turn()
        bench.speak("r", "a b")
        bench.load_gate.set()
        bench.settle()
        assert [message.model.state for message in bench.messages("d")] == ["absent"]
        assert bench.words("r") == "a b"
        assert len(bench.opened) == 2

    def test_overtaken_by_a_load(self, bench: WorkerBench) -> None:
        """Of an unload and a later load the load wins, and the unload fails."""
        bench.result_of(LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.call("e", LoadModel(model="m"))
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]
        assert [message.model.state for message in bench.messages("e")] == ["resident"]

    def test_unknown(self, bench: WorkerBench) -> None:
        """An unknown model is an error."""
        assert bench.result_of(UnloadModel(model="x")).code == "model_not_found"
        assert bench.result_of(PinModel(model="x", pinned=True), call_id="d").code == "model_not_found"


class TestPinAndCleanup:
    """PinModel and Cleanup."""

    def test_cleanup(self, make_bench: MakeBench) -> None:
        """A pass evicts the models that are idle for too long and reports measured bytes, to both callers."""
        bench = make_bench({"m": 100, "n": 50, "o": 30}, idle_timeout_s=10)
        for model in "mn":
            bench.result_of(LoadModel(model=model), call_id=f"load-{model}")
        assert bench.result_of(PinModel(model="n", pinned=True), call_id="pin").model.pinned
        bench.clock.advance(11)
        assert bench.states() == {"m": "resident", "n": "resident", "o": "absent"}
        bench.call("c", Cleanup())
        bench.call("d", Cleanup())
        bench.settle()
        (reply,) = bench.messages("c")
        assert (reply.cleanup.models_checked, reply.cleanup.models_unloaded) == (["m", "n"], ["m"])
        assert (reply.cleanup.vram_before_bytes, reply.cleanup.vram_after_bytes) == (150, 50)
        assert reply.cleanup.timestamp == WALL + bench.clock.now
        assert bench.messages("d") == [msgspec.structs.replace(reply, id="d")]
        assert bench.snapshot().cleanup == reply.cleanup

    def test_unpin(self, make_bench: MakeBench) -> None:
        """An unpinned model is evicted like any other."""
        bench = make_bench(idle_timeout_s=10)
        bench.result_of(LoadModel(model="m"))
        bench.result_of(PinModel(model="m", pinned=True), call_id="pin")
        bench.result_of(PinModel(model="m", pinned=False), call_id="unpin")
        bench.clock.advance(11)
        assert bench.result_of(Cleanup(), call_id="d").cleanup.models_unloaded == ["m"]
