"""Two GPU workers on one folder of voices, as in a cluster: each sees what the other one changes."""

import pytest

from gpu_worker.voices.folder_watch import SCAN_INTERVAL_S
from shared.protocol import CloneVoice, CreateConsent, DeleteVoice, FindConsent, FindVoice, UpdateVoice
from tests.gpu_worker.worker_bench import VOICE, MakeBench, WorkerBench


@pytest.fixture
def benches(make_bench: MakeBench) -> tuple[WorkerBench, WorkerBench]:
    """Two workers on one folder."""
    return make_bench(), make_bench()


def names(bench: WorkerBench) -> list[str]:
    """The names of the voices that the worker reports."""
    return [voice.name for voice in bench.snapshot().voices]


def test_a_miss_scans_the_folder(benches: tuple[WorkerBench, WorkerBench]) -> None:
    """A voice saved through one worker is found through the other one at once, without waiting for its next scan."""
    one, other = benches
    voice = one.save_voice("Ada")
    assert other.result_of(FindVoice(name="ada"), call_id="f").voice == voice
    consent = one.result_of(CreateConsent(name="Ada", language="en"), VOICE, call_id="c").consent
    assert other.result_of(FindConsent(id=consent.id), call_id="g").consent == consent
    assert other.result_of(FindVoice(name="nobody"), call_id="h").code == "voice_not_found"


def test_the_voice_of_another_worker_is_spoken_at_once(benches: tuple[WorkerBench, WorkerBench]) -> None:
    """A request with the id of a voice that another worker saved a moment ago is spoken."""
    one, other = benches
    voice = one.save_voice("Ada")
    other.speak("r", "a b", voice=voice.id, saved_voice=True)
    other.settle()
    assert other.words("r") == "a b"


def test_a_freed_name_can_be_taken_at_once(benches: tuple[WorkerBench, WorkerBench]) -> None:
    """A name that another worker has just freed is not refused by an old list."""
    one, other = benches
    voice = one.save_voice("Ada")
    other.result_of(FindVoice(name="Ada"), call_id="f")
    one.result_of(DeleteVoice(id=voice.id), call_id="d")
    saved = other.result_of(CloneVoice(name="Ada"), VOICE, call_id="c").voice
    assert (saved.name, names(other)) == ("Ada", ["Ada"])
    assert one.result_of(CloneVoice(name="ada"), VOICE, call_id="e").param == "name"


def test_changes_are_seen_without_a_miss(benches: tuple[WorkerBench, WorkerBench]) -> None:
    """A new name, and a deletion, reach the other worker with its next scan, half a second later.

    Then the voice is not spoken any more, although its recording was in memory.
    """
    one, other = benches
    voice = one.save_voice("Ada")
    other.result_of(FindVoice(name="Ada"), call_id="f")
    other.speak("before", "a", voice=voice.id, saved_voice=True)
    other.settle()
    one.result_of(UpdateVoice(id=voice.id, name="Eva"), call_id="r")
    other.clock.advance(SCAN_INTERVAL_S)
    other.settle()
    assert (names(other), other.words("before")) == (["Eva"], "a")
    one.result_of(DeleteVoice(id=voice.id), call_id="d")
    other.clock.advance(SCAN_INTERVAL_S)
    other.settle()
    other.speak("after", "a", voice=voice.id, saved_voice=True)
    other.settle()
    assert (names(other), other.last_message("after").code) == ([], "voice_not_found")


def test_calls_wait_for_the_scan_that_began_after_them(benches: tuple[WorkerBench, WorkerBench]) -> None:
    """A scan that is under way may have missed a voice, so a call waits for the next one; a cancelled call does not."""
    one, other = benches
    other.voice_files.gate.clear()
    other.call("slow", CloneVoice(name="Bob"), VOICE)  # holds the thread up
    other.call("f1", FindVoice(name="Ada"))
    other.turn()
    one.save_voice("Ada")
    other.call("f2", FindVoice(name="Ada"))
    other.call("f3", FindVoice(name="Ada"))
    other.turn()
    assert other.messages("f1") == other.messages("f2") == []
    other.cancel("f3")
    other.voice_files.gate.set()
    other.settle()
    assert [other.kinds(call) for call in ("f1", "f2", "f3")] == [["Reply"], ["Reply"], []]
