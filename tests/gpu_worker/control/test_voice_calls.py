"""Admin calls for voices: clone, find, delete and design."""

import msgspec
import pytest

from gpu_worker.control.voice_design import DESIGN_MAX_FRAMES, DESIGN_TEXT
from gpu_worker.engines.base import JobError
from gpu_worker.transport import PeerGone
from gpu_worker.worker import Drain
from shared.protocol import (
    CloneVoice,
    CreateConsent,
    DeleteConsent,
    DeleteVoice,
    DesignVoice,
    ExportVoice,
    Failed,
    FindConsent,
    FindVoice,
    ImportVoice,
    KeyLimits,
    ListConsents,
    LoadModel,
    PortableConsent,
    PortableVoice,
    RenameConsent,
    Reply,
    UpdateVoice,
)
from tests.gpu_worker.fakes import a_spec
from tests.gpu_worker.worker_bench import OTHER, VOICE, WEB, MakeBench, WorkerBench, pcm_of


class TestSavedVoices:
    """CloneVoice, FindVoice and DeleteVoice."""

    def test_clone_find_delete(self, bench: WorkerBench) -> None:
        """A cloned voice is found by name and id, ignoring case, until it is deleted."""
        action = CloneVoice(name="Ada", text="what it says", description="calm", consent="yes")
        voice = bench.result_of(action, VOICE).voice
        assert (voice.name, voice.kind, voice.seconds, voice.in_context) == ("Ada", "clone", 1.0, True)
        for index, name in enumerate(("ada", voice.id.upper())):
            assert bench.result_of(FindVoice(name=name), call_id=f"f{index}").voice == voice
        assert bench.snapshot().voices == [voice]
        assert bench.result_of(DeleteVoice(id=voice.id), call_id="d").voice == voice
        assert bench.result_of(FindVoice(name="Ada"), call_id="g").code == "voice_not_found"
        assert bench.result_of(DeleteVoice(id=voice.id), call_id="h").code == "voice_not_found"

    @pytest.mark.parametrize(
        ("name", "payload", "code"),
        [
            ("Preset", VOICE, "invalid_value"),
            ("Ada", b"\1", "invalid_audio"),
            ("Ada", None, "invalid_audio"),
        ],
    )
    def test_clone_refused(self, bench: WorkerBench, name: str, payload: bytes | None, code: str) -> None:
        """A voice with a taken name or without a recording is not saved."""
        assert bench.result_of(CloneVoice(name=name), payload).code == code
        assert bench.snapshot().voices == []


class TestConsents:
    """CreateConsent, FindConsent, ListConsents, RenameConsent and DeleteConsent."""

    def test_from_creation_to_deletion(self, bench: WorkerBench) -> None:
        """A consent is found and listed until it is deleted; no voice comes of it."""
        consent = bench.result_of(CreateConsent(name="Ada", language="en"), VOICE).consent
        assert (consent.name, consent.language) == ("Ada", "en")
        assert bench.result_of(FindConsent(id=consent.id), call_id="f").consent == consent
        renamed = bench.result_of(RenameConsent(id=consent.id, name="Eva"), call_id="r").consent
        assert renamed == msgspec.structs.replace(consent, name="Eva")
        listed = bench.result_of(ListConsents(limit=1), call_id="l")
        assert (listed.consents, listed.has_more) == ([renamed], False)
        assert bench.snapshot().voices == []
        assert bench.result_of(DeleteConsent(id=consent.id), call_id="d").consent == renamed
        for index, action in enumerate(
            (
                FindConsent(id=consent.id),
                RenameConsent(id=consent.id, name="x"),
                DeleteConsent(id=consent.id),
                ListConsents(limit=1, after=consent.id),
            )
        ):
            assert bench.result_of(action, call_id=f"n{index}").code == "consent_not_found"

    def test_refused(self, bench: WorkerBench) -> None:
        """A consent without a recording is not saved."""
        failed = bench.result_of(CreateConsent(name="Ada", language="en"))
        assert (failed.code, failed.param) == ("invalid_audio", "recording")

    def test_drain(self, bench: WorkerBench) -> None:
        """The drain waits for the disk; at its deadline the message says that the disk may still take the consent."""
        bench.voice_files.gate.clear()
        bench.call("c", CreateConsent(name="Ada", language="en"), VOICE)
        bench.inbox.put(Drain(30))
        bench.turn(3)
        assert bench.messages("c") == []
        bench.clock.advance(31)
        bench.worker.run()
        (failed,) = bench.messages("c")
        assert failed.message.endswith("the consent may be saved all the same")


class TestSlowDisk:
    """A write of a voice takes long, and everything else goes on."""

    def test_streams_go_on(self, bench: WorkerBench) -> None:
        """Streams go on while a voice is saved and deleted; the calls are answered after the write."""
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

    def test_deleted_with_the_answer(self, bench: WorkerBench) -> None:
        """A request right behind the answer to a delete does not find the voice, even in the same turn."""
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
        """Of two saves with one name the first gets it, and the second fails at once."""
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("d", CloneVoice(name="ada"), VOICE)
        bench.turn()
        assert (bench.messages("c"), bench.last_message("d").param) == ([], "name")
        bench.voice_files.gate.set()
        bench.settle()
        assert (bench.kinds("c"), bench.kinds("d"), len(bench.voices.list())) == (["Reply"], ["Failed"], 1)

    def test_one_too_many(self, make_bench: MakeBench) -> None:
        """Voices that are being saved count towards max_voices."""
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
        """Of two deletes of one voice the first succeeds, and the second finds no voice."""
        voice = bench.save_voice("Ada")
        for call_id in ("c", "d"):
            bench.call(call_id, DeleteVoice(id=voice.id))
        bench.settle()
        assert (bench.kinds("c"), [message.code for message in bench.messages("d")]) == (["Reply"], ["voice_not_found"])

    def test_fails(self, bench: WorkerBench) -> None:
        """If the disk fails, the call fails with its message, and the list of voices stays as it was."""
        bench.voice_files.errors = [OSError(28, "No space left on device")]
        failed = bench.result_of(CloneVoice(name="Ada"), VOICE)
        assert (failed.code, failed.message) == (
            "internal_error",
            "the voice could not be saved: No space left on device",
        )
        assert bench.snapshot().voices == []
        voice = bench.result_of(CloneVoice(name="Ada"), VOICE, call_id="d").voice
        bench.voice_files.errors = [OSError(30, "Read-only file system")]
        failed = bench.result_of(DeleteVoice(id=voice.id), call_id="e")
        assert failed.message == "the voice could not be deleted: Read-only file system"
        assert bench.snapshot().voices == [voice]

    def test_cancelled(self, bench: WorkerBench) -> None:
        """A started write is completed; a cancelled call and one of a lost web worker get no answer, others do."""
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
        """The drain waits for pending writes, cancelled ones too; the other calls get their answers."""
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
        """At the deadline pending writes fail, and the message says that the disk may still take them."""
        voice = bench.save_voice("Bob")
        bench.voice_files.gate.clear()
        bench.call("c", CloneVoice(name="Ada"), VOICE)
        bench.call("d", DeleteVoice(id=voice.id))
        bench.inbox.put(Drain(30))
        bench.turn()
        bench.clock.advance(31)
        bench.worker.run()
        for call_id, participle in (("c", "saved"), ("d", "deleted")):
            (failed,) = bench.messages(call_id)
            assert failed.code == "shutting_down"
            assert failed.message.endswith(f"the voice may be {participle} all the same")


class TestDesign:
    """DesignVoice: the voice-design model speaks, and the recording is saved."""

    @pytest.fixture
    def bench(self, make_bench: MakeBench) -> WorkerBench:
        """A worker with one model, which designs voices."""
        return make_bench(specs=[msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")])

    def test_saved(self, bench: WorkerBench) -> None:
        """The model speaks DESIGN_TEXT as described; the recording and the text are saved."""
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
        """A description takes the place of the prompt in the saved voice."""
        action = DesignVoice(name="Ada", prompt="an old sailor", description="Salty.")
        voice = bench.result_of(action).voice
        assert (voice.description, voice.prompt) == ("Salty.", "an old sailor")

    def test_script(self, bench: WorkerBench) -> None:
        """With a script the voice says that text, in the text's own language, and is cloned with it."""
        script = "one two three four five six seven"
        reply = bench.result_of(DesignVoice(name="Ada", prompt="an old sailor", script=script * 9))
        (job,) = bench.engines["designer"].admitted
        assert (job.text, job.language) == (script * 9, "auto")
        assert bench.voices.load(reply.voice.id).text == script * 9

    def test_fails(self, bench: WorkerBench) -> None:
        """If the model fails, no voice is saved, and the call fails with the model's error."""
        bench.open_errors["designer"] = [JobError("model_unavailable", "a shard is damaged")]
        assert bench.result_of(DesignVoice(name="Ada", prompt="p")) == Failed(
            id="c", code="model_unavailable", message="a shard is damaged", param="model", retry_after_s=5.0
        )
        assert len(bench.voices.list()) == 0

    def test_limits_of_the_key(self, bench: WorkerBench) -> None:
        """A design counts as a request of its key, and waits as long as one."""
        action = DesignVoice(name="Ada", prompt="p", limits=KeyLimits(requests_per_minute=1), priority="batch")
        bench.call("a", action)
        bench.call("b", msgspec.structs.replace(action, name="Bob"))
        bench.settle()
        assert bench.messages("a")[0].voice.name == "Ada"
        (failed,) = bench.messages("b")
        assert (failed.code, failed.retry_after_s > 0) == ("rate_limit_exceeded", True)

    def test_cut_off(self, bench: WorkerBench) -> None:
        """Speech that DESIGN_MAX_FRAMES cut off is not saved, and the call fails."""
        bench.call("load", LoadModel(model="designer"))
        bench.settle()
        bench.engines["designer"].finish_reason = "length"
        failed = bench.result_of(DesignVoice(name="Ada", prompt="p"))
        assert (failed.code, "did not come to an end" in failed.message) == ("synthesis_failed", True)
        assert bench.voices.list() == []

    @pytest.mark.parametrize("speaking", [False, True])
    def test_cancelled(self, bench: WorkerBench, *, speaking: bool) -> None:
        """A cancelled design ends its request, queued or running; no voice is saved and no answer sent."""
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
        assert bench.result_of(DesignVoice(name="Ada", prompt="p"), call_id="d").voice.name == "Ada"

    def test_cancelled_during_the_write(self, bench: WorkerBench) -> None:
        """After the speech the model is released, and the voice is saved even if the call is cancelled then."""
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

    def test_disk_full(self, bench: WorkerBench) -> None:
        """If the disk fails, the call fails with its message and no voice is listed."""
        bench.voice_files.errors = [OSError(28, "No space left on device")]
        failed = bench.result_of(DesignVoice(name="Ada", prompt="p"))
        assert (failed.code, failed.message) == (
            "internal_error",
            "the voice could not be saved: No space left on device",
        )
        assert len(bench.voices.list()) == 0

    def test_peer_gone(self, bench: WorkerBench) -> None:
        """The loss of a web worker ends its designs."""
        bench.load_gate.clear()
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.turn(2)
        bench.inbox.put(PeerGone(WEB))
        bench.load_gate.set()
        bench.settle()
        assert bench.messages("c") == []
        assert len(bench.voices.list()) == 0

    def test_refused_name(self, bench: WorkerBench) -> None:
        """A refused name fails before the model is loaded."""
        assert bench.result_of(DesignVoice(name="preset", prompt="p")).param == "name"
        assert bench.opened == []

    def test_name_taken_meanwhile(self, bench: WorkerBench) -> None:
        """A name that another voice got during the speech is refused."""
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.turn(2)
        bench.call("d", CloneVoice(name="Ada"), VOICE)
        bench.settle()
        assert bench.kinds("d") == ["Reply"]
        assert [message.code for message in bench.messages("c")] == ["invalid_value"]

    def test_queue_full(self, make_bench: MakeBench) -> None:
        """A design waits in the queue like a request, and is refused like one."""
        spec = msgspec.structs.replace(a_spec("designer"), task="VoiceDesign")
        bench = make_bench(specs=[spec], slots=1, max_concurrency=1, max_queue=1)
        for name in ("one", "two", "three"):
            bench.call(name, DesignVoice(name=name, prompt="p"))
        bench.turn()
        assert [message.code for message in bench.messages("three")] == ["queue_full"]

    def test_shutting_down(self, bench: WorkerBench) -> None:
        """Designs fail when the worker drains, queued and new ones."""
        bench.call("c", DesignVoice(name="Ada", prompt="p"))
        bench.inbox.put(Drain(30))
        bench.call("d", DesignVoice(name="Bob", prompt="p"))
        bench.worker.run()
        bench.turn()
        assert bench.last_message("c").code == "shutting_down"
        assert bench.last_message("d").code == "shutting_down"

    def test_no_such_model(self, make_bench: MakeBench) -> None:
        """Without a voice-design model in the catalogue the call fails."""
        assert make_bench().result_of(DesignVoice(name="Ada", prompt="p")).code == "model_unavailable"


class TestMovedVoices:
    """UpdateVoice, ExportVoice and ImportVoice."""

    def test_renamed(self, bench: WorkerBench) -> None:
        """The new name is there with the answer."""
        voice = bench.save_voice("Ada")
        renamed = bench.result_of(UpdateVoice(id=voice.id, name="Eva"), call_id="r").voice
        assert renamed == msgspec.structs.replace(voice, name="Eva")
        assert bench.snapshot().voices == [renamed]
        assert bench.result_of(UpdateVoice(id="voice_none", name="Bob"), call_id="n").code == "voice_not_found"

    def test_from_one_server_to_another(self, bench: WorkerBench) -> None:
        """A voice with its consent comes back as it was, under another name and with ids of its own."""
        consent = bench.result_of(CreateConsent(name="Ada L.", language="en"), VOICE, call_id="k").consent
        clone = CloneVoice(name="Ada", text="what it says", description="calm", consent=consent.id)
        voice = bench.result_of(clone, VOICE).voice
        exported = bench.result_of(ExportVoice(id=voice.id), call_id="e").exported
        assert bench.result_of(ImportVoice(voice=exported), call_id="t").code == "invalid_value"
        moved = msgspec.structs.replace(exported, name="Eva")
        imported = bench.result_of(ImportVoice(voice=moved), call_id="i").voice
        assert imported == msgspec.structs.replace(voice, id=imported.id, name="Eva", created_at=imported.created_at)
        assert imported.id != voice.id
        consents = bench.result_of(ListConsents(limit=9), call_id="l").consents
        assert {(each.name, each.created_at) for each in consents} == {("Ada L.", consent.created_at)}
        assert len(consents) == 2
        again = bench.result_of(ExportVoice(id=imported.id), call_id="f").exported
        assert again == moved

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"name": "Preset"}, "invalid_value"),
            ({"name": ""}, "invalid_value"),
            ({"pcm": b"\1"}, "invalid_audio"),
            ({"pcm": bytes(48_000)}, "invalid_audio"),
            ({"text": "x" * 4000}, "invalid_value"),
        ],
    )
    def test_refused(self, bench: WorkerBench, changes: dict[str, object], code: str) -> None:
        """A refused voice leaves nothing, its consent included."""
        consent = PortableConsent(name="Ada L.", language="en", created_at=7, pcm=VOICE)
        voice = PortableVoice(name="Ada", kind="clone", pcm=VOICE, consent=consent)
        assert bench.result_of(ImportVoice(voice=msgspec.structs.replace(voice, **changes))).code == code
        assert bench.snapshot().voices == []
        assert bench.result_of(ListConsents(limit=9), call_id="l").consents == []

    def test_a_design_that_was_heard(self, bench: WorkerBench) -> None:
        """Speech that was made before is saved as it is: no model speaks again."""
        voice = bench.result_of(DesignVoice(name="Bob", prompt="calm", script="Good morning."), VOICE).voice
        assert (voice.kind, voice.prompt, voice.seconds, voice.in_context) == ("design", "calm", 1.0, True)
        assert bench.result_of(ExportVoice(id=voice.id), call_id="e").exported.pcm == VOICE
        other = bench.result_of(DesignVoice(name="Eve", prompt="calm"), VOICE, call_id="d").voice
        assert not other.in_context, "a transcript that nobody knows"
