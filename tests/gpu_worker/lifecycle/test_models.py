"""Loads, downloads, evictions and measurements as requests see them."""

import pytest
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError
from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.residency import Progress
from gpu_worker.residency.manager import FILE_CHECK_S
from gpu_worker.residency.policy import SHORTAGE_WAIT_S
from shared.protocol import (
    Cleanup,
    LoadModel,
    UnloadModel,
)
from tests.gpu_worker.fakes import FakeDevice
from tests.gpu_worker.worker_bench import MakeBench, WorkerBench, loaded


class TestModels:
    """The requests of a model that comes or goes."""

    def test_load_fails(self, bench: WorkerBench) -> None:
        """All requests that wait for a failed load get its error; the next request tries again."""
        bench.open_errors["m"] = [OSError("the disk is gone")]
        bench.speak("r", "one")
        bench.speak("s", "two")
        bench.settle()
        for name in "rs":
            (failed,) = bench.messages(name)
            assert failed.code == "model_unavailable"
            assert "the disk is gone" in failed.message
        assert bench.references() == {"m": 0}
        bench.speak("t", "three")
        bench.settle()
        assert bench.words("t") == "three"

    def test_warm_up(self, make_bench: MakeBench) -> None:
        """The synthesis thread warms an engine up after a load and after a restore, before any job. (The fake checks.)

        If that fails, the first job tries again. A broken device ends the process.
        """
        bench = loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        engine = bench.engines["m"]
        for error in (None, MemoryError("full")):
            engine.warm_up_errors.append(error)
            bench.speak(f"n {error}", "one", model="n")
            bench.settle()
            assert bench.states()["m"] == "offloaded"
            bench.speak(f"m {error}", "one")
            bench.settle()
            assert bench.words(f"m {error}") == "one"
        bench.speak("n", "one", model="n")
        bench.settle()
        engine.warm_up_errors.append(RuntimeError("CUDA error: device-side assert triggered"))
        bench.speak("m", "two")
        with pytest.raises(BrokenDeviceError):
            bench.worker.run()

    def test_load_runs_out_of_memory(self, make_bench: MakeBench) -> None:
        """A load that runs out of memory is repeated after idle models are evicted; the request waits."""
        bench = loaded(make_bench({"m": 100, "n": 100}))
        bench.open_errors["n"] = [MemoryError("full")]
        bench.speak("r", "x", model="n")
        bench.settle()
        assert bench.words("r") == "x"
        assert bench.states() == {"m": "offloaded", "n": "resident"}

    def test_preload(self, make_bench: MakeBench) -> None:
        """The models of the start are loaded without a request; the snapshot lists the pending ones."""
        bench = make_bench({"m": 100, "n": 100, "o": 100}, preload=("m", "n"))
        bench.open_errors["n"] = [OSError("the disk is gone")]
        assert bench.snapshot().preloading == ["m", "n"]
        bench.settle()
        assert bench.snapshot().preloading == []
        assert bench.states() == {"m": "resident", "n": "absent", "o": "absent"}

    def test_preload_without_room(self, make_bench: MakeBench) -> None:
        """The first model stays; the second is refused, as the snapshot and the log say."""
        bench = make_bench({"n": 100, "m": 100}, preload=("m", "n"), device=FakeDevice(budget_bytes=150))
        with capture_logs() as logs:
            bench.settle()
        snapshot = bench.snapshot()
        assert snapshot.preloading == []
        n, m = snapshot.models
        assert (m.state, n.state) == ("resident", "absent")
        assert "n needs" in n.detail
        (warning,) = [entry for entry in logs if entry["log_level"] == "warning"]
        assert (warning["model"], "n needs" in warning["reason"]) == ("n", True)

    def test_refused_unload_keeps_the_preload_pending(self, make_bench: MakeBench) -> None:
        """A model that an unload could not stop is still pending."""
        bench = make_bench({"m": 100}, preload=("m",))
        bench.load_gate.clear()
        bench.speak("r", "a")
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.last_message("c").code == "model_busy"
        assert bench.snapshot().preloading == ["m"]

    def test_unload_ends_the_preload(self, make_bench: MakeBench) -> None:
        """A model that is unloaded before its preload is not pending any more."""
        bench = make_bench({"m": 100}, preload=("m",))
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.snapshot().preloading == []

    def test_transitions_are_logged(self, bench: WorkerBench) -> None:
        """The log has the model, the kind, the seconds, and the process's memory before and after."""
        with capture_logs() as logs:
            loaded(bench)
        (entry,) = [entry for entry in logs if entry["event"] == "transition_done"]
        assert (entry["model"], entry["kind"], entry["log_level"]) == ("m", "load", "info")
        assert {"seconds", "before_mb", "after_mb"} <= entry.keys()

    def test_a_download_holds_up_no_other_model(self, make_bench: MakeBench) -> None:
        """During a download other models are loaded, unloaded and cleaned up; requests for the model wait.

        The model is "loading", and the snapshot shows the progress of the download until its end.
        """
        bench = loaded(make_bench({"m": 100, "n": 100, "far": 100}, idle_timeout_s=10))
        bench.files.remote.add("far")
        bench.files.gate.clear()
        bench.speak("r", "one", model="far")
        bench.settle()
        bench.inbox.put(Progress(model="far", detail="fetching file 3 of 9"))
        bench.speak("s", "two", model="n")
        bench.settle()
        assert (bench.words("s"), bench.kinds("r")) == ("two", [])
        far = bench.snapshot().models[2]
        assert (far.state, far.detail) == ("loading", "fetching file 3 of 9")
        bench.call("unload", UnloadModel(model="m"))
        bench.settle()
        assert bench.last_message("unload").model.state == "absent"
        bench.clock.advance(11)
        bench.call("clean", Cleanup())
        bench.settle()
        assert bench.last_message("clean").cleanup.models_unloaded == ["n"]
        bench.files.gate.set()
        bench.settle()
        assert bench.words("r") == "one"
        assert bench.snapshot().models[2].detail == ""
        assert bench.files.threads["download"] == {"download"}

    def test_download_fails(self, bench: WorkerBench) -> None:
        """All waiting requests and calls get the error, and the status shows it until the next request's load works."""
        bench.files.remote.add("m")
        bench.files.download_errors["m"] = [JobError("model_unavailable", "the hub is out of reach")]
        bench.speak("r", "one")
        bench.call("c", LoadModel(model="m"))
        bench.settle()
        for name in "rc":
            (failed,) = bench.messages(name)
            assert (failed.code, failed.message) == ("model_unavailable", "the hub is out of reach")
            assert failed.retry_after_s is not None
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("absent", "the hub is out of reach")
        bench.speak("s", "two")
        bench.settle()
        assert bench.words("s") == "two"
        assert bench.snapshot().models[0].detail == ""

    def test_files_appear_and_disappear(self, bench: WorkerBench) -> None:
        """Copied or deleted files show within seconds, without a request for the model."""
        bench.files.problems["m"] = "its weights are not there"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("unavailable", "its weights are not there")
        bench.files.problems.clear()
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        (model,) = bench.snapshot().models
        assert (model.state, model.detail) == ("absent", "")

    def test_waits_for_a_busy_model(self, make_bench: MakeBench) -> None:
        """A model that fits once another is idle waits for that, and is loaded as soon as it is."""
        bench = loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.engines["m"].muted.add("a b c")
        bench.speak("r", "a b c")
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.clock.advance(SHORTAGE_WAIT_S - 1)
        bench.settle()
        assert bench.messages("s") == []
        bench.engines["m"].muted.clear()
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("a b c", "x")

    def test_evicts_a_model_between_two_requests(self, make_bench: MakeBench) -> None:
        """A model that is idle only from the end of one request to the arrival of the next is evicted in between."""
        bench = loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.engines["m"].muted.add("a")
        bench.speak("r", "a")
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.engines["m"].muted.clear()
        bench.turn()
        assert bench.kinds("r")[-1] == "Finished"
        bench.speak("r2", "b")
        bench.settle()
        assert (bench.words("s"), bench.words("r2")) == ("x", "b")

    def test_two_models_where_one_fits(self, make_bench: MakeBench) -> None:
        """Two models requested together on a device with room for one speak one after the other."""
        bench = make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150))
        bench.speak("r", "a b c")
        bench.speak("s", "x y z", model="n")
        bench.settle()
        assert (bench.words("r"), bench.words("s")) == ("a b c", "x y z")

    def test_no_room_for_too_long(self, make_bench: MakeBench) -> None:
        """A model that finds no room for too long is refused with the arithmetic; running requests go on."""
        bench = loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.engines["m"].muted.add("a b c")
        bench.speak("r", "a b c")
        bench.speak("s", "x", model="n")
        bench.settle()
        bench.clock.advance(SHORTAGE_WAIT_S)
        bench.settle()
        (failed,) = bench.messages("s")
        assert failed.code == "insufficient_vram"
        assert "n needs" in failed.message
        bench.engines["m"].muted.clear()
        bench.settle()
        assert bench.words("r") == "a b c"

    def test_idle_models_are_evicted(self, make_bench: MakeBench) -> None:
        """An idle model is evicted for a requested one, and restored by its own next request."""
        bench = loaded(make_bench({"m": 100, "n": 100}, device=FakeDevice(budget_bytes=150)))
        bench.speak("r", "x", model="n")
        bench.settle()
        assert bench.states() == {"m": "offloaded", "n": "resident"}
        bench.speak("s", "y")
        bench.settle()
        assert bench.words("s") == "y"
        assert len(bench.opened) == 2

    def test_keep_alive(self, make_bench: MakeBench) -> None:
        """keep_alive_s of a request decides how long its model stays: not at all, or as configured."""
        bench = make_bench({"m": 100}, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True)
        bench.speak("r", "x", keep_alive_s=0)
        bench.settle()
        assert bench.states() == {"m": "offloaded"}
        bench.speak("s", "y")
        bench.settle()
        bench.clock.advance(9)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        bench.clock.advance(2)
        bench.settle()
        assert bench.states() == {"m": "offloaded"}

    def test_keep_alive_of_a_request_without_a_slot(self, make_bench: MakeBench) -> None:
        """A request that was cancelled in the queue does not change how long the model stays."""
        bench = make_bench(slots=1, idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True)
        loaded(bench)
        bench.engines["m"].muted.add("a b")
        bench.speak("r", "a b", keep_alive_s=-1)
        bench.speak("s", "x", keep_alive_s=0)
        bench.turn()
        bench.engines["m"].muted.clear()
        bench.cancel("s")
        bench.settle()
        bench.clock.advance(60)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        assert bench.snapshot().models[0].keep_alive_s == -1

    def test_a_slow_request_keeps_its_model(self, make_bench: MakeBench) -> None:
        """A request keeps its model resident, however long it takes, as long as not all of it is said."""
        bench = loaded(make_bench(idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True))
        bench.engines["m"].muted.add("a b")
        bench.speak("r", "a b")
        bench.settle()
        bench.clock.advance(500)
        bench.settle()
        assert bench.states() == {"m": "resident"}
        bench.engines["m"].muted.clear()
        bench.settle()
        assert bench.words("r") == "a b"

    def test_a_stalled_reader_keeps_no_model(self, make_bench: MakeBench) -> None:
        """A speech that is said in full needs no model any more, however long its reader takes."""
        bench = loaded(make_bench(idle_timeout_s=10, cleanup_interval_s=1, cleanup_enabled=True, stall_timeout_s=1_000))
        bench.speak("r", "a b", credit=0)
        bench.settle()
        bench.clock.advance(500)
        bench.settle()
        assert bench.states() == {"m": "offloaded"}
        bench.credit("r", 2)
        bench.settle()
        assert bench.words("r") == "a b"

    def test_growth_is_measured(self, bench: WorkerBench) -> None:
        """The model's memory is measured again when a request leaves its slot."""
        loaded(bench)
        bench.engines["m"].n_bytes = 140
        bench.speak("r", "x")
        bench.settle()
        (model,) = bench.snapshot().models
        assert model.bytes == {"weights": 140}

    def test_unload_between_requests(self, bench: WorkerBench) -> None:
        """A model that was unloaded is loaded again for the next request."""
        loaded(bench)
        bench.call("c", UnloadModel(model="m"))
        bench.settle()
        assert bench.states() == {"m": "absent"}
        bench.speak("r", "x")
        bench.settle()
        assert bench.words("r") == "x"
        assert len(bench.opened) == 2
