"""Calls, through the loop that answers them: models by hand, cleanup passes, saved voices."""

from typing import Any

import msgspec
import pytest

from gpu_worker.control import DESIGN_MAX_FRAMES, DESIGN_TEXT
from gpu_worker.engines.base import JobError
from gpu_worker.residency.manager import FILE_CHECK_S
from gpu_worker.transport import PeerGone
from gpu_worker.worker import Drain
from shared.protocol import (
    Action,
    Cleanup,
    CloneVoice,
    DeleteVoice,
    DesignVoice,
    Failed,
    FindVoice,
    LoadModel,
    PinModel,
    Reply,
    UnloadModel,
)
from tests.gpu_worker.fakes import WALL, FakeDevice, a_spec
from tests.gpu_worker.worker_bench import OTHER, VOICE, WEB, MakeBench, WorkerBench, pcm_of


def _done(bench: WorkerBench, action: Action, payload: bytes | None = None, call_id: str = "c") -> Any:
    """The one answer to a call, once everything has come to rest."""
    before = len(bench.messages(call_id))
    bench.call(call_id, action, payload)
    bench.settle()
    (answer,) = bench.messages(call_id)[before:]
    return answer


class TestLoad:
    """A model is brought by hand."""

    def test_answered_when_it_is_there(self, bench: WorkerBench) -> None:
        """The answer comes with the model, not before; asked again, at once."""
        bench.load_gate.clear()
        bench.call("c", LoadModel(model="m"))
        bench.turn(3)
        assert bench.messages("c") == []
        bench.load_gate.set()
        bench.settle()
        (reply,) = bench.messages("c")
        assert (reply.model.id, reply.model.state, reply.model.bytes) == ("m", "resident", {"weights": 100})
        assert _done(bench, LoadModel(model="m"), call_id="d").model.state == "resident"
        assert len(bench.opened) == 1

    def test_two_at_once(self, bench: WorkerBench) -> None:
        """Each of two calls for the same load is answered."""
        bench.call("c", LoadModel(model="m"))
        bench.call("d", LoadModel(model="m"))
        bench.settle()
        assert bench.kinds("c") == bench.kinds("d") == ["Reply"]

    def test_given_up(self, bench: WorkerBench) -> None:
        """A call that nobody waits for is not answered; the model comes all the same, and others are told."""
        bench.load_gate.clear()
        for call_id in ("c", "d"):
            bench.call(call_id, LoadModel(model="m"))
        bench.turn(2)
        bench.cancel("c", peer=b"web-2")
        bench.cancel("d")
        bench.load_gate.set()
        bench.settle()
        assert (bench.kinds("c"), bench.messages("d")) == (["Reply"], [])
        assert bench.states() == {"m": "resident"}

    def test_fails(self, bench: WorkerBench) -> None:
        """A load that fails says why; the next call tries again."""
        bench.open_errors["m"] = [JobError("model_unavailable", "a shard is damaged")]
        failed = _done(bench, LoadModel(model="m"))
        assert (failed.code, failed.message) == ("model_unavailable", "a shard is damaged")
        assert _done(bench, LoadModel(model="m"), call_id="d").model.state == "resident"

    def test_larger_than_thought(self, make_bench: MakeBench) -> None:
        """A model that turns out too large for the budget was there: the call is answered although it leaves again."""
        bench = make_bench({"m": 100}, specs=[a_spec("m", 10)], device=FakeDevice(budget_bytes=50))
        assert _done(bench, LoadModel(model="m")).model.state == "resident"
        assert bench.states() == {"m": "offloaded"}

    def test_unknown_and_unavailable(self, bench: WorkerBench) -> None:
        """What cannot be loaded is refused like a request for it."""
        failed = _done(bench, LoadModel(model="x"))
        assert (failed.code, failed.param) == ("model_not_found", "model")
        bench.files.problems["m"] = "its weights are not there"
        failed = _done(bench, LoadModel(model="m"), call_id="d")
        assert failed.code == "model_unavailable"
        assert "its weights are not there" in failed.message

    def test_overtaken_by_an_unload(self, bench: WorkerBench) -> None:
        """Of a load and an unload that meet, the later counts, and the earlier is told."""
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
    """A model is dropped by hand."""

    def test_answered_when_it_is_gone(self, bench: WorkerBench) -> None:
        """A loaded model leaves the device and host RAM; one that is not there is not there."""
        _done(bench, LoadModel(model="m"))
        reply = _done(bench, UnloadModel(model="m"), call_id="d")
        assert (reply.model.state, reply.model.bytes) == ("absent", {})
        assert bench.device.on_device == {}
        assert _done(bench, UnloadModel(model="m"), call_id="e").model.state == "absent"

    def test_unavailable(self, bench: WorkerBench) -> None:
        """A model whose weights are not on the disk is as good as unloaded, and called unavailable."""
        bench.files.problems["m"] = "gone"
        bench.clock.advance(FILE_CHECK_S)
        bench.settle()
        assert _done(bench, UnloadModel(model="m"), call_id="d").model.state == "unavailable"

    def test_busy(self, bench: WorkerBench) -> None:
        """A model with a request, queued or running, stays; the request does not notice."""
        bench.speak("r", "a b", credit=1)
        failed = _done(bench, UnloadModel(model="m"))
        assert (failed.code, failed.param) == ("model_busy", "model")
        bench.credit("r", 1)
        bench.settle()
        assert bench.words("r") == "a b"

    def test_overtaken_by_a_request(self, bench: WorkerBench) -> None:
        """A request that comes before the drop began prevents it, and the call is told."""
        _done(bench, LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.speak("r", "a b")
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]
        assert bench.words("r") == "a b"
        assert len(bench.opened) == 1

    def test_overtaken_by_a_request_that_is_given_up(self, bench: WorkerBench) -> None:
        """A request prevents the drop even where it is cancelled in the same turn; the call is told all the same."""
        _done(bench, LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.speak("r", "a b")
        bench.cancel("r")
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]

    def test_request_during_the_drop(self, bench: WorkerBench) -> None:
        """A request that comes too late to prevent it waits for the model to come back; the call is answered."""
        _done(bench, LoadModel(model="m"))
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
        """The later counts, also this way round."""
        _done(bench, LoadModel(model="m"))
        bench.call("d", UnloadModel(model="m"))
        bench.call("e", LoadModel(model="m"))
        bench.settle()
        assert [message.code for message in bench.messages("d")] == ["model_busy"]
        assert [message.model.state for message in bench.messages("e")] == ["resident"]

    def test_unknown(self, bench: WorkerBench) -> None:
        """A model that there is not."""
        assert _done(bench, UnloadModel(model="x")).code == "model_not_found"
        assert _done(bench, PinModel(model="x", pinned=True), call_id="d").code == "model_not_found"


class TestPinAndCleanup:
    """What stays and what leaves."""

    def test_cleanup(self, make_bench: MakeBench) -> None:
        """A pass evicts what is idle for too long and nothing else, and says what it did in measured bytes."""
        bench = make_bench({"m": 100, "n": 50, "o": 30}, idle_timeout_s=10)
        for model in "mn":
            _done(bench, LoadModel(model=model), call_id=f"load-{model}")
        assert _done(bench, PinModel(model="n", pinned=True), call_id="pin").model.pinned
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
        """Let go, a model leaves like any other."""
        bench = make_bench(idle_timeout_s=10)
        _done(bench, LoadModel(model="m"))
        _done(bench, PinModel(model="m", pinned=True), call_id="pin")
        _done(bench, PinModel(model="m", pinned=False), call_id="unpin")
        bench.clock.advance(11)
        assert _done(bench, Cleanup(), call_id="d").cleanup.models_unloaded == ["m"]


class TestSavedVoices:
    """Voices that are kept."""

    def test_clone_find_delete(self, bench: WorkerBench) -> None:
        """A recording becomes a voice that is found by name and id, case aside, until it is deleted."""
        action = CloneVoice(name="Ada", text="what it says", description="calm", consent="yes")
        voice = _done(bench, action, VOICE).voice
        assert (voice.name, voice.kind, voice.seconds, voice.in_context) == ("Ada", "clone", 1.0, True)
        for index, name in enumerate(("ada", voice.id.upper())):
            assert _done(bench, FindVoice(name=name), call_id=f"f{index}").voice == voice
        assert bench.snapshot().voices == [voice]
        assert _done(bench, DeleteVoice(id=voice.id), call_id="d").voice == voice
        assert _done(bench, FindVoice(name="Ada"), call_id="g") == Reply(id="g")
        assert _done(bench, DeleteVoice(id=voice.id), call_id="h").code == "voice_not_found"

    @pytest.mark.parametrize(
        ("name", "payload", "code"),
        [
            ("Preset", VOICE, "invalid_value"),
            ("Ada", b"\1", "invalid_audio"),
            ("Ada", None, "invalid_audio"),
        ],
    )
    def test_clone_refused(self, bench: WorkerBench, name: str, payload: bytes | None, code: str) -> None:
        """What will not do is not kept."""
        assert _done(bench, CloneVoice(name=name), payload).code == code
        assert bench.snapshot().voices == []


class TestSlowDisk:
    """A voice is being written, which may take long, and everybody else goes on."""

    def test_nobody_waits(self, bench: WorkerBench) -> None:
        """Streams speak while a voice is saved and while it is deleted; the calls are answered when it is done."""
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.speak("r", "a b c")
        bench.settle()
        assert (bench.words("r"), bench.messages("c"), bench.snapshot().voices) == ("a b c", [], [])
        bench.voice_files.gate.set()
        bench.settle()
        (reply,) = bench.messages("c")
        assert bench.snapshot().voices == [reply.voice]

        bench.voice_files.gate.clear()
        bench.call("d", DeleteVoice(id=reply.voice.id))
        bench.speak("s", "x y z", voice=reply.voice.id, saved_voice=True)
        bench.settle()
        assert (bench.words("s"), bench.messages("d")) == ("x y z", [])
        bench.voice_files.gate.set()
        bench.settle()
        assert bench.messages("d") == [Reply(id="d", voice=reply.voice)]
        assert bench.voice_files.threads == {"voices"}

    def test_gone_with_the_answer(self, bench: WorkerBench) -> None:
        """A request that comes behind the answer to a deletion does not find the voice, even in the same turn."""
        voice = bench.save_voice("Ada")
        bench.voice_files.gate.clear()
        bench.call("d", DeleteVoice(id=voice.id))
        bench.turn()
        bench.voice_files.gate.set()
        bench.voice_writer.close(10)  # the report is in the inbox
        bench.speak("r", "a", voice=voice.id, saved_voice=True)
        bench.turn()
        assert (bench.kinds("d"), bench.last_message("r").code) == (["Reply"], "voice_not_found")

    def test_two_of_one_name(self, bench: WorkerBench) -> None:
        """Of two who save one name at once the first gets it, and the second hears at once that it is taken."""
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("d", CloneVoice(name="ada"), VOICE)
        bench.turn()
        assert (bench.messages("c"), bench.last_message("d").param) == ([], "name")
        bench.voice_files.gate.set()
        bench.settle()
        assert (bench.kinds("c"), bench.kinds("d"), len(bench.voices.list())) == (["Reply"], ["Failed"], 1)

    def test_one_too_many(self, make_bench: MakeBench) -> None:
        """No more voices are kept than may be, however many are saved at once."""
        bench = make_bench(max_voices=2)
        bench.voice_files.gate.clear()
        for name in ("Ada", "Bob", "Cy"):
            bench.call(name, CloneVoice(name=name), VOICE)
        bench.turn()
        bench.voice_files.gate.set()
        bench.settle()
        assert [bench.kinds(name) for name in ("Ada", "Bob", "Cy")] == [["Reply"], ["Reply"], ["Failed"]]
        assert len(bench.voices.list()) == 2

    def test_deleted_twice(self, bench: WorkerBench) -> None:
        """Each of two who delete one voice at once is answered, and the second that there is none."""
        voice = bench.save_voice("Ada")
        for call_id in ("c", "d"):
            bench.call(call_id, DeleteVoice(id=voice.id))
        bench.settle()
        assert (bench.kinds("c"), [message.code for message in bench.messages("d")]) == (["Reply"], ["voice_not_found"])

    def test_fails(self, bench: WorkerBench) -> None:
        """A disk that does not take a voice, or keep it from going, is told of, and nothing has changed."""
        bench.voice_files.errors = [OSError(28, "No space left on device")]
        failed = _done(bench, CloneVoice(name="Ada"), VOICE)
        assert (failed.code, failed.message) == (
            "synthesis_failed",
            "the voice could not be saved: No space left on device",
        )
        assert bench.snapshot().voices == []
        voice = _done(bench, CloneVoice(name="Ada"), VOICE, call_id="d").voice
        bench.voice_files.errors = [OSError(30, "Read-only file system")]
        failed = _done(bench, DeleteVoice(id=voice.id), call_id="e")
        assert failed.message == "the voice could not be deleted: Read-only file system"
        assert bench.snapshot().voices == [voice]

    def test_given_up(self, bench: WorkerBench) -> None:
        """What was begun is completed; whoever has gone, or does not wait any more, is told nothing, and others are."""
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("c", CloneVoice(name="Bob"), VOICE, peer=OTHER)
        bench.call("d", CloneVoice(name="Cy"), VOICE)
        bench.turn()
        bench.cancel("c")
        bench.inbox.put(PeerGone(OTHER))
        bench.turn()
        bench.voice_files.gate.set()
        bench.settle()
        assert (bench.messages("c"), bench.messages("c", OTHER), bench.kinds("d")) == ([], [], ["Reply"])
        assert [voice.name for voice in bench.snapshot().voices] == ["Ada", "Bob", "Cy"]

    def test_drain(self, bench: WorkerBench) -> None:
        """The end waits for what is being written, and its caller hears how it went; nobody's leaving shortens that."""
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("d", CloneVoice(name="Bob"), VOICE)
        bench.inbox.put(Drain(30))
        bench.turn(3)
        bench.cancel("d")
        bench.turn(3)
        bench.voice_files.gate.set()
        bench.worker.run()
        assert (bench.kinds("c"), bench.messages("d")) == (["Reply"], [])
        assert [voice.name for voice in bench.voices.list()] == ["Ada", "Bob"]

    def test_drain_ends(self, bench: WorkerBench) -> None:
        """But not for ever: who still waits then hears that nobody knows how it ends."""
        voice = bench.save_voice("Bob")
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("d", DeleteVoice(id=voice.id))
        bench.inbox.put(Drain(30))
        bench.turn()
        bench.clock.advance(31)
        bench.worker.run()
        for call_id, done in (("c", "saved"), ("d", "deleted")):
            (failed,) = bench.messages(call_id)
            assert failed.code == "shutting_down"
            assert failed.message.endswith(f"the voice may be {done} all the same")


class TestDesign:
    """The voice-design model speaks, and what it said is kept."""

    @pytest.fixture
    def bench(self, make_bench: MakeBench) -> WorkerBench:
        """One model, and it designs voices."""
        return make_bench(specs=[msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")])

    def test_kept(self, bench: WorkerBench) -> None:
        """The model is asked for one text in the voice described; its recording and the text are the voice."""
        bench.call("c", DesignVoice(name="Ada", prompt="an old sailor"))
        bench.settle()
        (reply,) = bench.messages("c")
        assert (reply.voice.name, reply.voice.kind) == ("Ada", "design")
        assert (reply.voice.in_context, reply.voice.description) == (True, "an old sailor")
        (job,) = bench.engines["designer"].admitted
        assert (job.task, job.text, job.instructions) == ("VoiceDesign", DESIGN_TEXT, "an old sailor")
        assert job.sampling.max_new_tokens == DESIGN_MAX_FRAMES
        reference = bench.voices.load(reply.voice.id)
        said = b"".join(pcm_of(word) * 200 for word in DESIGN_TEXT.split())
        assert (reference.text, reference.pcm) == (DESIGN_TEXT, said)
        assert bench.references() == {"designer": 0}

    def test_description(self, bench: WorkerBench) -> None:
        """Where it is described in other words, those are kept."""
        action = DesignVoice(name="Ada", prompt="an old sailor", description="Salty.")
        assert _done(bench, action).voice.description == "Salty."

    def test_fails(self, bench: WorkerBench) -> None:
        """Where the model fails, nothing is kept, and the call is told why."""
        bench.open_errors["designer"] = [JobError("model_unavailable", "a shard is damaged")]
        assert _done(bench, DesignVoice(name="Ada", prompt="p")) == Failed(
            id="c", code="model_unavailable", message="a shard is damaged", param="model", retry_after_s=5.0
        )
        assert len(bench.voices.list()) == 0

    @pytest.mark.parametrize("speaking", [False, True])
    def test_given_up(self, bench: WorkerBench, *, speaking: bool) -> None:
        """Nobody waits any more: no model speaks for it, queued or begun, nothing is kept and nothing answered."""
        bench.load_gate.clear()
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.turn(2)
        if speaking:
            bench.load_gate.set()
            while not bench.engines or not bench.engines["designer"].admitted:
                bench.turn()
        bench.cancel("c")
        bench.load_gate.set()
        bench.settle()
        assert bench.messages("c") == []
        assert len(bench.voices.list()) == 0
        assert bench.references() == {"designer": 0}
        assert bench.snapshot().requests.cancelled == 1
        assert _done(bench, DesignVoice(name="Ada", prompt="p"), call_id="d").voice.name == "Ada"

    def test_given_up_while_it_is_written(self, bench: WorkerBench) -> None:
        """Once the model has spoken its speech is kept, and the model let go, whatever the disk and the caller do."""
        bench.voice_files.gate.clear()
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.settle()
        assert (bench.messages("c"), bench.references(), bench.voices.writing) == ([], {"designer": 0}, True)
        bench.cancel("c")
        bench.turn()
        bench.voice_files.gate.set()
        bench.settle()
        assert bench.messages("c") == []
        assert [voice.kind for voice in bench.voices.list()] == ["design"]

    def test_disk_that_is_full(self, bench: WorkerBench) -> None:
        """What the disk does not take is not kept, and the call is told why."""
        bench.voice_files.errors = [OSError(28, "No space left on device")]
        failed = _done(bench, DesignVoice(name="Ada", prompt="p"))
        assert (failed.code, failed.message) == (
            "synthesis_failed",
            "the voice could not be saved: No space left on device",
        )
        assert len(bench.voices.list()) == 0

    def test_of_a_web_worker_that_is_gone(self, bench: WorkerBench) -> None:
        """A web worker that dies takes its calls with it."""
        bench.load_gate.clear()
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.turn(2)
        bench.inbox.put(PeerGone(WEB))
        bench.load_gate.set()
        bench.settle()
        assert bench.messages("c") == []
        assert len(bench.voices.list()) == 0

    def test_name_taken_first(self, bench: WorkerBench) -> None:
        """A name that will not do is refused before anybody speaks."""
        assert _done(bench, DesignVoice(name="preset", prompt="p")).param == "name"
        assert bench.opened == []

    def test_name_taken_meanwhile(self, bench: WorkerBench) -> None:
        """A name that somebody else took while the model spoke is refused."""
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.turn(2)
        bench.call("d", CloneVoice(name="Ada"), VOICE)
        bench.settle()
        assert bench.kinds("d") == ["Reply"]
        assert [message.code for message in bench.messages("c")] == ["invalid_value"]

    def test_queue_full(self, make_bench: MakeBench) -> None:
        """It waits like a request, and is refused like one."""
        spec = msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")
        bench = make_bench(specs=[spec], slots=1, max_queue=1)
        for name in ("one", "two", "three"):
            bench.call(name, DesignVoice(name=name, prompt="p"))
        bench.turn()
        assert [message.code for message in bench.messages("three")] == ["queue_full"]

    def test_shutting_down(self, bench: WorkerBench) -> None:
        """What is not ready when the worker ends is refused."""
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.inbox.put(Drain(30))
        bench.call("d", DesignVoice(name="Bob", prompt="p"))
        bench.worker.run()
        bench.turn()
        assert bench.last_message("c").code == "shutting_down"
        assert bench.last_message("d").code == "shutting_down"

    def test_no_such_model(self, make_bench: MakeBench) -> None:
        """A catalogue without a voice-design model says so."""
        assert _done(make_bench(), DesignVoice(name="Ada", prompt="p")).code == "model_unavailable"
