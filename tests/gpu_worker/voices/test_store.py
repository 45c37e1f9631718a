"""Saved voices are on the disk whole or not at all, and found again after a restart."""

import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.voices.files import VoiceFiles
from gpu_worker.voices.store import MAX_NAME_CHARS, MOST_SAVING, RECENT, VoiceStore
from gpu_worker.voices.writer import VoiceWriter, VoiceWritten
from shared.protocol import SavedVoice
from tests.gpu_worker.fakes import FakeClock

SECOND = bytes(range(240)) * 200
"""One second of sound that is not silence: 24,000 samples."""


@pytest.fixture
def clock() -> FakeClock:
    """Unix seconds."""
    return FakeClock()


class Shelf:
    """The store as a new process finds it, and a disk that takes at once what is given to it."""

    def __init__(self, tmp_path: Path, clock: FakeClock, max_voices: int = 5) -> None:
        self.files = VoiceFiles(tmp_path / "voices")
        self.store = VoiceStore(self.files, max_voices, reserved=["Alloy", "ryan"], wall=clock)
        self.writer = VoiceWriter(self.files, _nobody)

    def save(self, name: str, pcm: bytes, **told: Any) -> SavedVoice:
        """A voice, from the first word to the disk."""
        return self.store.written(self.writer.carry_out(self.store.create(name, pcm, **told)))

    def delete(self, voice_id: str) -> SavedVoice:
        """And off it."""
        return self.store.written(self.writer.carry_out(self.store.delete(voice_id)))


def _nobody(report: VoiceWritten) -> None:
    """What is carried out at once reports to nobody."""
    raise AssertionError(report)


@pytest.fixture
def shelf(tmp_path: Path, clock: FakeClock) -> Shelf:
    """An empty store in a folder that does not exist yet."""
    return Shelf(tmp_path, clock)


def files(tmp_path: Path) -> set[str]:
    """The endings of what lies in the store's folder."""
    return {"".join(path.suffixes) for path in (tmp_path / "voices").glob("*")}


def test_saved_voice_is_told(shelf: Shelf) -> None:
    """A voice is described by what was given: its length, its kind, and whether its transcript is known."""
    voice = shelf.save("Ada", SECOND, kind="clone", text="Hello.", description="my aunt", consent="yes")
    assert voice == SavedVoice(
        id=voice.id,
        name="Ada",
        kind="clone",
        created_at=1000,
        seconds=1.0,
        in_context=True,
        description="my aunt",
    )
    assert shelf.store.find(voice.id) == voice
    assert shelf.store.list() == [voice]
    assert len(shelf.store) == 1


def test_recording_is_bit_identical(shelf: Shelf) -> None:
    """What is loaded is what was saved, keyed by the voice's id; the transcript decides how it is cloned."""
    in_context = shelf.save("Ada", SECOND, kind="clone", text="Hello.")
    embedded = shelf.save("Bob", SECOND[::-1], kind="design")
    assert shelf.store.load(in_context.id) == Reference(
        key=in_context.id, pcm=SECOND, text="Hello.", x_vector_only=False
    )
    assert shelf.store.load(embedded.id) == Reference(key=embedded.id, pcm=SECOND[::-1], text=None, x_vector_only=True)
    assert not embedded.in_context


def test_survives_a_restart(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A new process finds every voice, the oldest first, with all that was said of it."""
    voices = []
    for name in ("Zoe", "Ada", "Mia"):
        voices.append(shelf.save(name, SECOND, kind="clone", text="Hello."))
        clock.advance(1)
    again = Shelf(tmp_path, clock)
    assert again.store.list() == voices
    assert again.store.load(voices[1].id) == shelf.store.load(voices[1].id)


def test_consent_is_kept(shelf: Shelf, tmp_path: Path) -> None:
    """What was said of the speaker's consent stays on the disk beside the recording."""
    voice = shelf.save("Ada", SECOND, kind="clone", consent="recorded 2026-01-01")
    assert "recorded 2026-01-01" in (tmp_path / "voices" / f"{voice.id}.json").read_text()


def test_found_by_id_or_name(shelf: Shelf) -> None:
    """A voice is found by its id and by its name, case aside, and by nothing else."""
    voice = shelf.save("Änne", SECOND, kind="clone")
    for name in (voice.id, voice.id.upper(), "änne", " ÄNNE ", "A\u0308nne"):
        assert shelf.store.find(name) == voice
    assert shelf.store.find("Anne") is None


@pytest.mark.parametrize(
    "name",
    ["", "  ", "x" * (MAX_NAME_CHARS + 1), "two\nlines", "nul\0", "\u202eright to left", "\u200d", "alloy", " RYAN "],
)
def test_names_that_will_not_do(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """A name is short, printable and no preset voice's; a refused one leaves nothing on the disk."""
    with pytest.raises(JobError) as caught:
        shelf.save(name, SECOND, kind="clone")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "name")
    assert not (tmp_path / "voices").exists()


def test_names_are_unique(shelf: Shelf) -> None:
    """Two voices cannot bear one name, case aside, nor one the id of the other."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    for name in ("ada", "ADA ", "A\u200dda", voice.id):
        with pytest.raises(JobError, match="already"):
            shelf.save(name, SECOND, kind="clone")


def test_names_are_no_paths(shelf: Shelf, tmp_path: Path) -> None:
    """A name that looks like a path is a name, and an id that looks like one is no voice."""
    voice = shelf.save("../../evil", SECOND, kind="clone")
    assert {path.name for path in tmp_path.iterdir()} == {"voices"}
    assert all(path.stem == voice.id for path in (tmp_path / "voices").iterdir())
    with pytest.raises(JobError) as caught:
        shelf.store.load("../../evil")
    assert caught.value.code == "voice_not_found"


def test_bounded_in_number(tmp_path: Path, clock: FakeClock) -> None:
    """No more than so many are kept; deleting one makes room."""
    shelf = Shelf(tmp_path, clock, max_voices=2)
    first = shelf.save("a", SECOND, kind="clone")
    shelf.save("b", SECOND, kind="clone")
    with pytest.raises(JobError, match="delete one first") as caught:
        shelf.save("c", SECOND, kind="clone")
    assert caught.value.code == "invalid_value"
    shelf.delete(first.id)
    shelf.save("c", SECOND, kind="clone")


@pytest.mark.parametrize(
    "name", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
)
def test_names_of_joined_characters(shelf: Shelf, name: str) -> None:
    """Persian words and emoji that need an invisible joiner are names, kept as they are written."""
    voice = shelf.save(name, SECOND, kind="clone")
    assert voice.name == name
    assert shelf.store.find(name) == voice


@pytest.mark.parametrize(
    ("pcm", "text", "code", "param"),
    [
        (b"", None, "invalid_audio", "audio_sample"),
        (SECOND[:-1], None, "invalid_audio", "audio_sample"),
        (SECOND[:20_000], None, "invalid_audio", "audio_sample"),
        (SECOND * 61, None, "invalid_audio", "audio_sample"),
        (bytes(20_000) + SECOND[:20] + bytes(400_000), None, "invalid_audio", "audio_sample"),
        (SECOND, "word " * 100, "invalid_value", "ref_text"),
    ],
)
def test_recordings_that_no_voice_can_be_cloned_from(
    shelf: Shelf, pcm: bytes, text: str | None, code: str, param: str
) -> None:
    """Nothing, half a sample, a moment, an hour, a click in silence, or a text nobody says so fast: never kept."""
    with pytest.raises(JobError) as caught:
        shelf.save("Ada", pcm, kind="clone", text=text)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert shelf.store.list() == []


def test_designed_silence_is_the_models_fault(shelf: Shelf) -> None:
    """Where the model said nothing, the client did nothing wrong."""
    with pytest.raises(JobError, match="silent") as caught:
        shelf.save("Ada", bytes(48_000), kind="design")
    assert caught.value.code == "synthesis_failed"


def test_recent_recordings_are_not_read_again(shelf: Shelf, tmp_path: Path) -> None:
    """A voice that speaks often costs the disk nothing, until so many others have spoken since."""
    voices = [shelf.save(name, SECOND, kind="clone") for name in "abcde"]
    loaded = shelf.store.load(voices[0].id)
    for path in (tmp_path / "voices").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    assert shelf.store.load(voices[0].id) is loaded
    for path in (tmp_path / "voices").glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    for voice in voices[1 : RECENT + 1]:
        shelf.store.load(voice.id)
    again = shelf.store.load(voices[0].id)
    assert again == loaded
    assert again is not loaded


def test_deleted(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A deleted voice is gone from the list, the disk and the next process, and its name is free."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    assert shelf.delete(voice.id) == voice
    assert shelf.store.list() == Shelf(tmp_path, clock).store.list() == []
    assert files(tmp_path) == set()
    for act in (shelf.store.load, shelf.delete):
        with pytest.raises(JobError) as caught:
            act(voice.id)
        assert caught.value.code == "voice_not_found"
    shelf.save("Ada", SECOND, kind="clone")


def truncated(path: Path) -> None:
    """The recording's end is missing."""
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:-9])


def foreign(path: Path) -> None:
    """The recording is something else."""
    path.with_suffix(".safetensors").write_bytes(b"RIFF" * 100)


def missing(path: Path) -> None:
    """There is no recording."""
    path.with_suffix(".safetensors").unlink()


def not_json(path: Path) -> None:
    """The description cannot be read."""
    path.write_bytes(path.read_bytes()[:20])


def other_length(path: Path) -> None:
    """The description belongs to another recording."""
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "samples": 17}))


def other_id(path: Path) -> None:
    """The description says that it is another voice's."""
    other = next(found for found in path.parent.glob("*.json") if found != path)
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "id": other.stem}))


@pytest.mark.parametrize("damage", [truncated, foreign, missing, not_json, other_length, other_id])
def test_damaged_voices_are_left_out(
    shelf: Shelf, tmp_path: Path, clock: FakeClock, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged voice is named in the log and left where it is; the others are there."""
    broken = shelf.save("Ada", SECOND, kind="clone")
    whole = shelf.save("Bob", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{broken.id}.json")
    with caplog.at_level(logging.WARNING):
        assert Shelf(tmp_path, clock).store.list() == [whole]
    assert broken.id in caplog.text
    assert (tmp_path / "voices" / f"{broken.id}.json").exists()


@pytest.mark.parametrize("damage", [truncated, foreign, missing])
def test_damaged_while_running(shelf: Shelf, tmp_path: Path, damage: Any) -> None:
    """A recording that is damaged under a running process is an error of that request alone."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{voice.id}.json")
    with pytest.raises(JobError, match="damaged") as caught:
        shelf.store.load(voice.id)
    assert caught.value.code == "voice_not_found"


def test_two_of_one_name_on_the_disk(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """Of two voices that somebody gave one name by hand, the older is there."""
    first = shelf.save("Ada", SECOND, kind="clone")
    clock.advance(1)
    second = shelf.save("Bob", SECOND, kind="clone")
    path = tmp_path / "voices" / f"{second.id}.json"
    path.write_text(path.read_text().replace("Bob", "ADA"))
    assert Shelf(tmp_path, clock).store.list() == [first]


def test_death_while_writing(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """What a process left that died while it saved a voice is no voice, and does not stay for ever."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    path = tmp_path / "voices" / f"{voice.id}.json"
    path.rename(path.with_name(path.name + ".part"))
    again = Shelf(tmp_path, clock)
    assert again.store.list() == []
    assert files(tmp_path) == set()
    again.save("Ada", SECOND, kind="clone")


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_disk_that_is_full(
    shelf: Shelf, tmp_path: Path, clock: FakeClock, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not take a voice, at whatever point, leaves none behind: not in the list and not on the disk."""
    calls = 0
    sync = os.fsync

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match="No space left") as caught:
        shelf.save("Ada", SECOND, kind="clone")
    assert caught.value.code == "synthesis_failed"
    assert shelf.store.list() == Shelf(tmp_path, clock).store.list() == []
    assert files(tmp_path) == set()
    monkeypatch.undo()
    shelf.save("Ada", SECOND, kind="clone")


class TestBeingWritten:
    """Between what is to be written and how it went, while others ask."""

    def test_name_is_taken(self, shelf: Shelf) -> None:
        """A voice that is being saved is not there yet, but nobody else gets its name."""
        write = shelf.store.create("Ada", SECOND, kind="clone")
        assert (shelf.store.find("Ada"), shelf.store.list(), shelf.store.writing) == (None, [], True)
        with pytest.raises(JobError, match="already") as caught:
            shelf.store.create("ADA", SECOND, kind="clone")
        assert caught.value.code == "invalid_value"
        voice = shelf.store.written(shelf.writer.carry_out(write))
        assert (shelf.store.find("Ada"), shelf.store.writing) == (voice, False)

    def test_fails(self, shelf: Shelf) -> None:
        """What could not be saved was never there, and its name is free again."""
        write = shelf.store.create("Ada", SECOND, kind="clone")
        with pytest.raises(JobError, match="the disk is gone"):
            shelf.store.written(VoiceWritten(write=write, error=JobError("synthesis_failed", "the disk is gone")))
        assert (shelf.store.list(), shelf.store.writing) == ([], False)
        shelf.save("Ada", SECOND, kind="clone")

    def test_bounded_in_number(self, tmp_path: Path, clock: FakeClock) -> None:
        """Voices that are being saved count among those that may be kept."""
        shelf = Shelf(tmp_path, clock, max_voices=2)
        shelf.save("a", SECOND, kind="clone")
        write = shelf.store.create("b", SECOND, kind="clone")
        with pytest.raises(JobError, match="there are 2 saved voices already"):
            shelf.store.create("c", SECOND, kind="clone")
        shelf.store.written(shelf.writer.carry_out(write))
        assert len(shelf.store) == 2

    def test_bounded_in_memory(self, tmp_path: Path, clock: FakeClock) -> None:
        """A disk that does not keep up is given no more recordings to hold, and whoever comes is told to come back."""
        shelf = Shelf(tmp_path, clock, max_voices=1000)
        writes = [shelf.store.create(f"voice {index}", SECOND, kind="clone") for index in range(MOST_SAVING)]
        with pytest.raises(JobError) as caught:
            shelf.store.create("Ada", SECOND, kind="clone")
        assert caught.value.code == "queue_full"
        assert caught.value.retry_after_s is not None
        shelf.store.written(shelf.writer.carry_out(writes[0]))
        shelf.store.create("Ada", SECOND, kind="clone")

    def test_speaks_until_it_is_gone(self, shelf: Shelf) -> None:
        """A voice that is being deleted is there, and its name taken, until it has been."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        write = shelf.store.delete(voice.id)
        assert (shelf.store.find("Ada"), shelf.store.writing) == (voice, True)
        assert shelf.store.load(voice.id).pcm == SECOND
        with pytest.raises(JobError, match="already"):
            shelf.store.create("Ada", SECOND, kind="clone")
        assert shelf.store.written(shelf.writer.carry_out(write)) == voice
        assert (shelf.store.find("Ada"), shelf.store.writing) == (None, False)
        with pytest.raises(JobError, match="there is no saved voice"):
            shelf.store.load(voice.id)

    def test_gone_from_the_disk_first(self, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
        """A voice whose files are gone before anybody has told is not there, rather than damaged."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        shelf.writer.carry_out(shelf.store.delete(voice.id))
        with pytest.raises(JobError, match="there is no saved voice") as caught:
            shelf.store.load(voice.id)
        assert caught.value.code == "voice_not_found"
        assert caplog.records == []

    def test_deleted_twice_at_once(self, shelf: Shelf) -> None:
        """Of two who delete a voice the second is told that there is none."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        first, second = (shelf.writer.carry_out(shelf.store.delete(voice.id)) for _ in range(2))
        assert shelf.store.written(first) == voice
        assert shelf.store.writing
        with pytest.raises(JobError) as caught:
            shelf.store.written(second)
        assert caught.value.code == "voice_not_found"
        assert not shelf.store.writing

    def test_disk_keeps_it(
        self, shelf: Shelf, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A voice that the disk does not let go of is there as before, also for the next process."""

        def read_only(_path: Path, **_options: object) -> None:
            raise OSError(30, "Read-only file system")

        voice = shelf.save("Ada", SECOND, kind="clone")
        monkeypatch.setattr(Path, "unlink", read_only)
        with pytest.raises(JobError, match="could not be deleted: Read-only file system") as caught:
            shelf.delete(voice.id)
        monkeypatch.undo()
        assert caught.value.code == "synthesis_failed"
        assert shelf.store.list() == Shelf(tmp_path, clock).store.list() == [voice]
        assert shelf.store.load(voice.id).pcm == SECOND
        assert shelf.delete(voice.id) == voice
