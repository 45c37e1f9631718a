"""Faults of jobs, engines, the device and the process."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import Pcm
from gpu_worker.engines.faults import BrokenDeviceError
from gpu_worker.residency import MoverFailed
from gpu_worker.residency.models import ModelState
from gpu_worker.transport import TransportFailed
from gpu_worker.worker import Wake
from shared.protocol import (
    CloneVoice,
    Counters,
    DesignVoice,
    Failed,
    LoadModel,
    Ping,
)
from tests.gpu_worker.fakes import a_spec
from tests.gpu_worker.worker_bench import OTHER, VOICE, WEB, MakeBench, WorkerBench, loaded


class TestFaults:
    """How far each fault reaches."""

    def test_job_fails(self, bench: WorkerBench) -> None:
        """A Fault event fails its own request, with the engine's error; the others go on."""
        loaded(bench)
        bench.speak("r", "one fault never")
        bench.speak("s", "x y z")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Audio", "Failed"]
        assert (bench.last_message("r").code, bench.last_message("r").param) == ("invalid_audio", "ref_audio")
        assert bench.words("s") == "x y z"
        assert bench.snapshot().requests == Counters(started=3, finished=2, failed=1)
        assert bench.references() == {"m": 0}

    def test_late_event(self, bench: WorkerBench) -> None:
        """An event of a cancelled job is dropped."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.speak("s", "x y z")
        bench.turn()
        gone = next(job.id for job in bench.engines["m"].admitted if job.text == "a b c")
        step = bench.engines["m"].step
        bench.engines["m"].step = lambda stalled: [Pcm(gone, b"late"), *step(stalled)]  # type: ignore[method-assign] # a pipeline may do that
        bench.cancel("r")
        bench.settle()
        assert bench.words("r") == "a"
        assert bench.words("s") == "x y z"

    @pytest.mark.parametrize("more", ["", " c d"])
    def test_text_fails(self, bench: WorkerBench, more: str) -> None:
        """Text that an engine cannot take, or its end, fails its own request; the others go on."""
        loaded(bench)
        bench.speak("s", "x y z", open=True)
        bench.speak("r", "a b", open=True)
        bench.settle()
        bench.engines["m"].text_errors.append(ValueError("what a text"))
        if more:
            bench.append("r", more)
        bench.end_text("r")
        bench.end_text("s")
        bench.settle()
        assert bench.kinds("r").count("Failed") == 1
        assert bench.last_message("r").code == "synthesis_failed"
        assert bench.words("s") == "x y z"
        assert (bench.references(), len(bench.opened)) == ({"m": 0}, 1)

    def test_text_fails_that_came_before_the_slot(self, make_bench: MakeBench) -> None:
        """The same for text that came while the request was in the queue; none of it follows."""
        bench = loaded(make_bench(slots=1))
        bench.engines["m"].text_errors.append(ValueError("what a text"))
        bench.speak("s", "x y z")
        bench.speak("r", "a", open=True)
        for text in (" b", " c"):
            bench.append("r", text)
        bench.end_text("r")
        bench.settle()
        assert bench.kinds("r") == ["Started", "Failed"]
        assert bench.words("s") == "x y z"
        assert (bench.references(), len(bench.opened)) == ({"m": 0}, 1)

    def test_engine_cannot_judge_a_job(self, bench: WorkerBench) -> None:
        """An error about one job's text fails its own request; the others go on."""
        loaded(bench)
        bench.speak("r", "a b", open=True)
        bench.settle()
        bench.engines["m"].waits_errors.append(ValueError("what a text"))
        bench.speak("s", "x y z")
        bench.settle()
        assert bench.last_message("r").code == "synthesis_failed"
        assert "what a text" in bench.last_message("r").message
        assert bench.words("s") == "x y z"
        assert (bench.references(), len(bench.opened)) == ({"m": 0}, 1)

    def test_engine_fails_before_its_step(self, bench: WorkerBench) -> None:
        """An error about no certain job costs the requests of the engine, as one of its step does."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.turn()
        bench.engines["m"].runnable_errors.extend([ValueError("lost my place")] * 2)
        bench.settle()
        assert bench.last_message("r").code == "synthesis_failed"
        bench.speak("s", "again")
        bench.settle()
        assert (bench.words("s"), len(bench.opened)) == ("again", 2)

    def test_engine_fails(self, make_bench: MakeBench) -> None:
        """A failed engine fails its own requests; other models go on, and the next request gets a new engine."""
        bench = loaded(make_bench({"m": 100, "n": 100}), "m", "n")
        bench.engines["m"].step_errors.extend([None, ValueError("lost my place")])
        bench.speak("r", "a b c")
        bench.speak("s", "a b c", credit=0)
        bench.speak("t", "x y z", model="n")
        bench.settle()
        for name in "rs":
            assert bench.last_message(name).code == "synthesis_failed"
            assert "lost my place" in bench.last_message(name).message
        assert bench.words("t") == "x y z"
        assert bench.states() == {"m": "absent", "n": "resident"}
        bench.speak("u", "again")
        bench.settle()
        assert bench.words("u") == "again"
        assert len(bench.opened) == 3

    def test_engine_fails_with_requests_queued(self, make_bench: MakeBench) -> None:
        """Requests queued for a failed engine wait for the new one."""
        bench = loaded(make_bench(slots=1))
        broken = bench.engines["m"]
        broken.step_errors.extend([ValueError("lost my place")] * 9)
        for index in range(5):
            bench.speak(f"r{index}", "x y z")
        bench.turn()
        assert bench.states() == {"m": "absent"}
        bench.speak("late", "a b")
        bench.settle()
        assert bench.last_message("r0").code == "synthesis_failed"
        assert [bench.words(f"r{index}") for index in range(1, 5)] == ["x y z"] * 4
        assert bench.words("late") == "a b"
        assert (broken.state, broken.steps, len(bench.opened)) == (ModelState.ABSENT, 4 + 1 - 3, 2)

    def test_engine_fails_while_another_model_loads(self, make_bench: MakeBench) -> None:
        """A failed engine admits no request while it waits to be dropped; a LoadModel waits for the new engine."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=1))
        bench.load_gate.clear()
        bench.speak("n", "one", model="n")
        bench.settle()
        bench.engines["m"].step_errors.append(ValueError("lost my place"))
        bench.speak("r", "a b c")
        bench.speak("s", "x y z")
        bench.settle()
        assert (bench.kinds("r"), bench.kinds("s")) == (["Started", "Failed"], [])
        assert bench.states() == {"m": "loading", "n": "loading"}
        bench.cancel("s")
        bench.call("c", LoadModel(model="m"))
        bench.settle()
        assert bench.messages("c") == []
        bench.load_gate.set()
        bench.settle()
        assert bench.last_message("c").model.state == "resident"
        assert (len(bench.opened), bench.words("n")) == (3, "one")

    def test_broken_device(self, make_bench: MakeBench) -> None:
        """A broken device ends the process, after every request has failed."""
        bench = loaded(make_bench({"m": 100, "n": 100}, slots=1), "m", "n")
        bench.engines["m"].step_errors.append(RuntimeError("CUDA error: an illegal memory access was encountered"))
        bench.speak("r", "a b")
        bench.speak("queued", "a b")
        bench.speak("t", "x y z", model="n", credit=0)
        with pytest.raises(BrokenDeviceError):
            bench.worker.run()
        for name in ("r", "queued", "t"):
            assert bench.last_message(name).code == "synthesis_failed"
            assert bench.last_message(name).message.startswith("the device of the GPU worker broke")
            assert bench.kinds(name).count("Failed") == 1

    def test_broken_device_in_admission(self, bench: WorkerBench) -> None:
        """The same if the error comes from `admit`."""
        loaded(bench)
        bench.engines["m"].admit_errors.append(RuntimeError("CUDA error: device-side assert triggered"))
        bench.speak("r", "a b")
        with pytest.raises(BrokenDeviceError):
            bench.worker.run()
        assert bench.kinds("r") == ["Failed"]

    def test_mover_fails(self, bench: WorkerBench) -> None:
        """Without its mover the process ends, after every request has failed."""
        loaded(bench)
        bench.speak("r", "a b c")
        bench.inbox.put(MoverFailed("CUDA error: device-side assert triggered"))
        with pytest.raises(BrokenDeviceError, match="device-side assert"):
            bench.worker.run()
        assert bench.last_message("r").code == "synthesis_failed"

    def test_unexpected_error(self, make_bench: MakeBench) -> None:
        """An unexpected error ends the process, after every request and call has failed, whatever else is broken."""
        designer = msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")
        bench = loaded(make_bench(specs=[a_spec("m"), designer], slots=1))
        bench.voice_files.gate.clear()
        bench.load_gate.clear()
        bench.engines["m"].muted.add("a b c")
        bench.speak("speaking", "a b c")
        bench.speak("queued", "a b c", peer=OTHER)
        bench.call("load", LoadModel(model="designer"))
        bench.call("design", DesignVoice(name="Ada", prompt="p"))
        bench.call("clone", CloneVoice(name="Bob"), VOICE)
        bench.settle()
        failing = _failing("the GPU is lost")
        bench.device.host = failing  # type: ignore[method-assign] # every Pong reads it
        bench.engines["m"].cancel = failing  # type: ignore[method-assign] # every end of a request calls it
        bench.send(Ping())
        with pytest.raises(OSError, match="the GPU is lost"):
            bench.worker.run()
        names = {"speaking": WEB, "queued": OTHER, "load": WEB, "design": WEB, "clone": WEB}
        for name, peer in names.items():
            (failed,) = [message for message in bench.messages(name, peer) if isinstance(message, Failed)]
            assert failed.code == "synthesis_failed"
            assert failed.message.startswith("the GPU worker broke: OSError: the GPU is lost")

    @pytest.mark.parametrize("defect", ["acquire", "release"])
    def test_unexpected_error_at_a_request(
        self, bench: WorkerBench, monkeypatch: pytest.MonkeyPatch, defect: str
    ) -> None:
        """The request at whose arrival or end the error happened fails, too."""
        loaded(bench)
        monkeypatch.setattr(bench.residency, defect, _failing("no such account"))
        bench.speak("r", "a")
        with pytest.raises(OSError, match="no such account"):
            bench.worker.run()
        assert bench.kinds("r").count("Failed") == 1
        assert bench.kinds("r")[-1] == "Failed"

    def test_transport_fails(self, bench: WorkerBench) -> None:
        """Without its socket the process ends."""
        bench.inbox.put(TransportFailed("the socket is gone"))
        with pytest.raises(RuntimeError, match="the socket is gone"):
            bench.turn()

    def test_wake(self, bench: WorkerBench) -> None:
        """Wake ends the wait for a command and does nothing else."""
        bench.inbox.put(Wake())
        bench.turn()
        assert bench.inbox.empty()
        assert bench.sent == []

    def test_not_a_command(self, bench: WorkerBench) -> None:
        """An object that is no Command is an error, not ignored."""
        bench.inbox.put("hello")
        with pytest.raises(AssertionError, match="hello"):
            bench.turn()


def _failing(message: str) -> Callable[..., Any]:
    """A function that raises OSError."""

    def fail(*_arguments: object) -> Any:
        raise OSError(message)

    return fail
