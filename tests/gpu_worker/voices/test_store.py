"""VoiceStore over real files: a voice is on the disk whole or not at all, and a restart finds it again."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.voices import ConsentStore, VoiceFiles, VoiceStore, VoiceWrite, VoiceWritten
from gpu_worker.voices.checks import MAX_NAME_CHARS
from gpu_worker.voices.store import CACHED_RECORDINGS, MAX_SAVING
from shared.protocol import PortableConsent, PortableVoice, SavedVoice, VoiceAccess
from tests.gpu_worker.fakes import FakeClock

SECOND = bytes(range(240)) * 200
"""One second of sound, 24,000 samples, not silent."""


@pytest.fixture
def clock() -> FakeClock:
    """Unix seconds."""
    return FakeClock()


class Shelf:
    """A VoiceStore over real files. Its writes wait in `submitted` until a test carries them out."""

    def __init__(self, tmp_path: Path, clock: FakeClock, max_voices: int = 5) -> None:
        self.files = VoiceFiles(tmp_path / "voices")
        self.submitted: list[VoiceWrite] = []
        self.store = VoiceStore(self.files, self.submitted.append, max_voices, reserved=["Alloy", "ryan"], wall=clock)

    def save(self, name: str, pcm: bytes, **fields: Any) -> SavedVoice:
        """Create a voice and write it at once."""
        self.store.create(name, pcm, **fields)
        return self.write()

    def delete(self, voice_id: str) -> SavedVoice:
        """Delete a voice, also from the disk, at once."""
        self.store.delete(voice_id)
        return self.write()

    def write(self) -> SavedVoice:
        """Carry out the oldest submitted write and report it."""
        return self.store.on_written(self.files.write(self.submitted.pop(0)))


@pytest.fixture
def shelf(tmp_path: Path, clock: FakeClock) -> Shelf:
    """An empty store whose folder does not exist yet."""
    return Shelf(tmp_path, clock)


def files(tmp_path: Path) -> set[str]:
    """The suffixes of the files of voices in the store's folder."""
    return {"".join(path.suffixes) for path in (tmp_path / "voices").glob("[!.]*")}


def test_saved_voice_has_the_given_fields(shelf: Shelf) -> None:
    """A voice shows its length, its kind, and whether its transcript is known."""
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
    assert len(shelf.store.list()) == 1


def test_recording_is_bit_identical(shelf: Shelf) -> None:
    """`load` returns the saved bytes under the voice's id; the transcript decides how the voice is cloned."""
    in_context = shelf.save("Ada", SECOND, kind="clone", text="Hello.")
    embedded = shelf.save("Bob", SECOND[::-1], kind="design")
    assert shelf.store.load(in_context.id) == Reference(
        key=in_context.id, pcm=SECOND, text="Hello.", x_vector_only=False
    )
    assert shelf.store.load(embedded.id) == Reference(key=embedded.id, pcm=SECOND[::-1], text=None, x_vector_only=True)
    assert not embedded.in_context


def test_survives_a_restart(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A new process finds every voice with all its fields, the oldest first."""
    voices = []
    for name in ("Zoe", "Ada", "Mia"):
        voices.append(shelf.save(name, SECOND, kind="clone", text="Hello."))
        clock.advance(1)
    again = Shelf(tmp_path, clock)
    assert again.store.list() == voices
    assert again.store.load(voices[1].id) == shelf.store.load(voices[1].id)


def test_consent_is_kept(shelf: Shelf, tmp_path: Path) -> None:
    """The note on the speaker's consent is on the disk beside the recording."""
    voice = shelf.save("Ada", SECOND, kind="clone", consent="recorded 2026-01-01")
    assert "recorded 2026-01-01" in (tmp_path / "voices" / f"{voice.id}.json").read_text()


def test_found_by_id_or_name(shelf: Shelf) -> None:
    """`find` takes an id or a name, ignores case, and takes nothing else."""
    voice = shelf.save("Änne", SECOND, kind="clone")
    for name in (voice.id, voice.id.upper(), "änne", " ÄNNE ", "A\u0308nne"):
        assert shelf.store.find(name) == voice
    assert shelf.store.find("Anne") is None


@pytest.mark.parametrize(
    "name",
    ["", "  ", "x" * (MAX_NAME_CHARS + 1), "two\nlines", "nul\0", "\u202eright to left", "\u200d", "alloy", " RYAN "],
)
def test_refused_names(shelf: Shelf, name: str, tmp_path: Path) -> None:
    """A name is short, printable and not the name of a preset voice; a refused one leaves nothing on the disk."""
    with pytest.raises(JobError) as caught:
        shelf.save(name, SECOND, kind="clone")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "name")
    assert not (tmp_path / "voices").exists()


def test_names_are_unique(shelf: Shelf) -> None:
    """A new name must not equal the name or id of another voice, ignoring case."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    for name in ("ada", "ADA ", "A\u200dda", voice.id):
        with pytest.raises(JobError, match="already"):
            shelf.save(name, SECOND, kind="clone")


def test_names_are_not_paths(shelf: Shelf, tmp_path: Path) -> None:
    """A name that looks like a path stays a name; an id that looks like a path is not found."""
    voice = shelf.save("../../evil", SECOND, kind="clone")
    assert {path.name for path in tmp_path.iterdir()} == {"voices"}
    assert {path.stem for path in (tmp_path / "voices").iterdir()} == {voice.id, ".lock"}
    with pytest.raises(JobError) as caught:
        shelf.store.load("../../evil")
    assert caught.value.code == "voice_not_found"


def test_bounded_in_number(tmp_path: Path, clock: FakeClock) -> None:
    """The store takes at most `max_voices`; deleting one makes room."""
    shelf = Shelf(tmp_path, clock, max_voices=2)
    first = shelf.save("a", SECOND, kind="clone")
    shelf.save("b", SECOND, kind="clone")
    with pytest.raises(JobError, match="delete one first") as caught:
        shelf.save("c", SECOND, kind="clone")
    assert caught.value.code == "invalid_value"
    shelf.delete(first.id)
    shelf.save("c", SECOND, kind="clone")


def test_no_voices_are_kept(tmp_path: Path, clock: FakeClock) -> None:
    """With TTS_MAX_VOICES=0 nothing has to be deleted first, whatever an earlier service saved."""
    Shelf(tmp_path, clock).save("a", SECOND, kind="clone")
    with pytest.raises(JobError, match=r"^this server keeps no saved voices \(TTS_MAX_VOICES=0\)$"):
        Shelf(tmp_path, clock, max_voices=0).save("b", SECOND, kind="clone")


@pytest.mark.parametrize(
    "name", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
)
def test_names_of_joined_characters(shelf: Shelf, name: str) -> None:
    """Persian words and emoji with an invisible joiner are allowed and kept unchanged."""
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
def test_refused_recordings(shelf: Shelf, pcm: bytes, text: str | None, code: str, param: str) -> None:
    """No sound, half a sample, too short, too long, a click in silence, a transcript too long: none is saved."""
    with pytest.raises(JobError) as caught:
        shelf.save("Ada", pcm, kind="clone", text=text)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert shelf.store.list() == []


def test_silent_design_is_an_error_of_the_model(shelf: Shelf) -> None:
    """If the model was silent, the error is `synthesis_failed`, not the client's `invalid_audio`."""
    with pytest.raises(JobError, match="silent") as caught:
        shelf.save("Ada", bytes(48_000), kind="design")
    assert caught.value.code == "synthesis_failed"


def test_recent_recordings_are_cached(shelf: Shelf, tmp_path: Path) -> None:
    """A voice in use is read once, until CACHED_RECORDINGS other voices have been loaded since."""
    voices = [shelf.save(name, SECOND, kind="clone") for name in "abcde"]
    loaded = shelf.store.load(voices[0].id)
    for path in (tmp_path / "voices").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    assert shelf.store.load(voices[0].id) is loaded
    for path in (tmp_path / "voices").glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    for voice in voices[1 : CACHED_RECORDINGS + 1]:
        shelf.store.load(voice.id)
    again = shelf.store.load(voices[0].id)
    assert again == loaded
    assert again is not loaded


def test_deleted(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A deleted voice is gone from the list and the disk, also after a restart, and its name is free."""
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
    """Cut off the end of the recording."""
    path.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes()[:-9])


def foreign(path: Path) -> None:
    """Replace the recording by another kind of file."""
    path.with_suffix(".safetensors").write_bytes(b"RIFF" * 100)


def missing(path: Path) -> None:
    """Remove the recording."""
    path.with_suffix(".safetensors").unlink()


def not_json(path: Path) -> None:
    """Cut off the end of the record."""
    path.write_bytes(path.read_bytes()[:20])


def other_length(path: Path) -> None:
    """Give the record another length than the recording."""
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "samples": 17}))


def other_id(path: Path) -> None:
    """Give the record the id of another voice."""
    other = next(found for found in path.parent.glob("*.json") if found != path)
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), "id": other.stem}))


def no_time(path: Path) -> None:
    """Give the record a time that no message can carry."""
    path.write_bytes(path.read_bytes().replace(b'"created_at": ', b'"created_at": 99999999999999999999'))


def nested(path: Path) -> None:
    """Give the record a field that is nested more deeply than a decoder goes."""
    path.write_bytes(path.read_bytes().rstrip(b"}\n") + b',"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@pytest.mark.parametrize("damage", [truncated, foreign, missing, not_json, other_length, other_id, no_time, nested])
def test_damaged_voices_are_left_out(shelf: Shelf, tmp_path: Path, clock: FakeClock, damage: Any) -> None:
    """A damaged voice is logged and stays on the disk, unlisted; the others are listed."""
    broken = shelf.save("Ada", SECOND, kind="clone")
    whole = shelf.save("Bob", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{broken.id}.json")
    with capture_logs() as logs:
        assert Shelf(tmp_path, clock).store.list() == [whole]
    assert [(entry["event"], entry["voice"]) for entry in logs] == [("saved_voice_unreadable", broken.id)]
    assert (tmp_path / "voices" / f"{broken.id}.json").exists()


@pytest.mark.parametrize("damage", [truncated, foreign, missing])
def test_damaged_while_running(shelf: Shelf, tmp_path: Path, damage: Any) -> None:
    """A recording damaged while the process runs fails the request that loads it."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{voice.id}.json")
    with pytest.raises(JobError, match="damaged") as caught:
        shelf.store.load(voice.id)
    assert caught.value.code == "voice_not_found"


def test_two_voices_with_one_name_on_the_disk(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """Two voices that were renamed by hand to one name are both listed; only their ids mean one of them."""
    first = shelf.save("Ada", SECOND, kind="clone")
    clock.advance(1)
    second = shelf.save("Bob", SECOND, kind="clone")
    path = tmp_path / "voices" / f"{second.id}.json"
    path.write_text(path.read_text().replace("Bob", "ADA"))
    store = Shelf(tmp_path, clock).store
    assert [voice.id for voice in store.list()] == [first.id, second.id]
    assert (store.find("ada"), store.find(first.id)) == (None, first)


def test_death_while_writing(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """Files of a process that died while it saved a voice are removed at the next start."""
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
    """A failing disk, at whichever sync, leaves no voice: neither in the list nor on the disk."""
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
    assert caught.value.code == "internal_error"
    assert shelf.store.list() == Shelf(tmp_path, clock).store.list() == []
    assert files(tmp_path) == set()
    monkeypatch.undo()
    shelf.save("Ada", SECOND, kind="clone")


class TestPendingWrites:
    """Between the submission of a write and its report."""

    def test_name_is_taken(self, shelf: Shelf) -> None:
        """A voice that is being saved is not listed yet, but its name is taken."""
        shelf.store.create("Ada", SECOND, kind="clone")
        assert (shelf.store.find("Ada"), shelf.store.list(), shelf.store.writing) == (None, [], True)
        with pytest.raises(JobError, match="already") as caught:
            shelf.store.create("ADA", SECOND, kind="clone")
        assert caught.value.code == "invalid_value"
        voice = shelf.write()
        assert (shelf.store.find("Ada"), shelf.store.writing) == (voice, False)

    def test_fails(self, shelf: Shelf) -> None:
        """A voice that could not be saved is not listed, and its name is free again."""
        write = shelf.store.create("Ada", SECOND, kind="clone")
        with pytest.raises(JobError, match="the disk is gone"):
            shelf.store.on_written(VoiceWritten(write=write, error=JobError("synthesis_failed", "the disk is gone")))
        shelf.submitted.clear()
        assert (shelf.store.list(), shelf.store.writing) == ([], False)
        shelf.save("Ada", SECOND, kind="clone")

    def test_bounded_in_number(self, tmp_path: Path, clock: FakeClock) -> None:
        """Voices that are being saved count towards `max_voices`."""
        shelf = Shelf(tmp_path, clock, max_voices=2)
        shelf.save("a", SECOND, kind="clone")
        shelf.store.create("b", SECOND, kind="clone")
        with pytest.raises(JobError, match="there are 2 saved voices already"):
            shelf.store.create("c", SECOND, kind="clone")
        shelf.write()
        assert len(shelf.store.list()) == 2

    def test_bounded_in_memory(self, tmp_path: Path, clock: FakeClock) -> None:
        """At most MAX_SAVING recordings wait for a slow disk; the next one is refused with a time to retry."""
        shelf = Shelf(tmp_path, clock, max_voices=1000)
        for index in range(MAX_SAVING):
            shelf.store.create(f"voice {index}", SECOND, kind="clone")
        with pytest.raises(JobError) as caught:
            shelf.store.create("Ada", SECOND, kind="clone")
        assert caught.value.code == "queue_full"
        assert caught.value.retry_after_s is not None
        shelf.write()
        shelf.store.create("Ada", SECOND, kind="clone")

    def test_usable_until_deleted(self, shelf: Shelf) -> None:
        """A voice that is being deleted is listed and usable, and its name taken, until the report."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        shelf.store.delete(voice.id)
        assert (shelf.store.find("Ada"), shelf.store.writing) == (voice, True)
        assert shelf.store.load(voice.id).pcm == SECOND
        with pytest.raises(JobError, match="already"):
            shelf.store.create("Ada", SECOND, kind="clone")
        assert shelf.write() == voice
        assert (shelf.store.find("Ada"), shelf.store.writing) == (None, False)
        with pytest.raises(JobError, match="there is no saved voice"):
            shelf.store.load(voice.id)

    def test_files_gone_before_the_report(self, shelf: Shelf) -> None:
        """A voice whose files are deleted before the report is not found; it is not logged as damaged."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        shelf.files.write(shelf.store.delete(voice.id))
        with capture_logs() as logs, pytest.raises(JobError, match="there is no saved voice") as caught:
            shelf.store.load(voice.id)
        assert caught.value.code == "voice_not_found"
        assert logs == []

    def test_two_pending_deletes(self, shelf: Shelf) -> None:
        """Of two pending deletes of one voice the second fails: there is no voice any more."""
        voice = shelf.save("Ada", SECOND, kind="clone")
        first, second = (shelf.files.write(shelf.store.delete(voice.id)) for _ in range(2))
        assert shelf.store.on_written(first) == voice
        assert shelf.store.writing
        with pytest.raises(JobError) as caught:
            shelf.store.on_written(second)
        assert caught.value.code == "voice_not_found"
        assert not shelf.store.writing

    def test_delete_fails(
        self, shelf: Shelf, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A voice that the disk could not delete is listed and usable as before, also after a restart."""

        def read_only(_path: Path, **_options: object) -> None:
            raise OSError(30, "Read-only file system")

        voice = shelf.save("Ada", SECOND, kind="clone")
        monkeypatch.setattr(Path, "unlink", read_only)
        with pytest.raises(JobError, match="could not be deleted: Read-only file system") as caught:
            shelf.delete(voice.id)
        monkeypatch.undo()
        assert caught.value.code == "internal_error"
        assert shelf.store.list() == Shelf(tmp_path, clock).store.list() == [voice]
        assert shelf.store.load(voice.id).pcm == SECOND
        assert shelf.delete(voice.id) == voice


def test_renamed(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A voice keeps its id and everything else; the old name is free, and a restart finds the new one."""
    voice = shelf.save("Ada", SECOND, kind="clone", text="Hello.", description="my aunt")
    shelf.store.update(voice.id, name=" ada ")
    with pytest.raises(JobError, match="already"):
        shelf.store.create("ADA", SECOND, kind="clone")
    assert shelf.store.find("Ada") == voice, "before the disk has taken it"
    renamed = shelf.write()
    assert renamed == msgspec.structs.replace(voice, name="ada")
    shelf.store.update(voice.id, name="Eva")
    assert (shelf.write().name, shelf.store.find("ada")) == ("Eva", None)
    assert Shelf(tmp_path, clock).store.list() == shelf.store.list() == [msgspec.structs.replace(voice, name="Eva")]
    assert not shelf.store.writing


@pytest.mark.parametrize("name", ["Bob", "bob", "alloy", "", "x" * (MAX_NAME_CHARS + 1), "a\nb"])
def test_names_that_a_voice_cannot_get(shelf: Shelf, name: str) -> None:
    """The rules of a new voice hold for a new name."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    shelf.save("Bob", SECOND, kind="clone")
    with pytest.raises(JobError) as caught:
        shelf.store.update(voice.id, name=name)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "name")


def test_two_voices_never_get_one_name(shelf: Shelf) -> None:
    """Of two renames that wait for the disk the first gets the name."""
    first, second = (shelf.save(name, SECOND, kind="clone") for name in ("Ada", "Bob"))
    shelf.store.update(first.id, name="Eva")
    with pytest.raises(JobError, match="already"):
        shelf.store.update(second.id, name="eva")
    shelf.write()
    assert [voice.name for voice in shelf.store.list()] == ["Eva", "Bob"]


def test_a_voice_that_is_being_deleted(shelf: Shelf) -> None:
    """Nobody can rename or export it; a rename before the delete does not bring it back."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    shelf.store.update(voice.id, name="Eva")
    shelf.store.delete(voice.id)
    consents = ConsentStore(shelf.files, shelf.submitted.append, 5)
    for change in (lambda: shelf.store.update(voice.id, name="Bob"), lambda: shelf.store.export(voice.id, consents)):
        with pytest.raises(JobError) as caught:
            change()
        assert caught.value.code == "voice_not_found"
    shelf.write()
    shelf.write()
    assert shelf.store.list() == []


def test_exported_with_its_consent(shelf: Shelf) -> None:
    """All that a voice is made of; a consent that was deleted is missing."""
    consents = ConsentStore(shelf.files, shelf.submitted.append, 5, wall=lambda: 77)
    consents.create("Ada L.", "en", SECOND)
    consent = consents.on_written(shelf.files.write(shelf.submitted.pop()))
    voice = shelf.save("Ada", SECOND * 2, kind="clone", text="Hello.", description="my aunt", consent=consent.id)
    exported = shelf.files.write(shelf.store.export(voice.id, consents)).exported
    assert exported == PortableVoice(
        name="Ada",
        kind="clone",
        text="Hello.",
        description="my aunt",
        pcm=SECOND * 2,
        consent=PortableConsent(name="Ada L.", language="en", created_at=77, pcm=SECOND),
    )
    consents.delete(consent.id)
    consents.on_written(shelf.files.write(shelf.submitted.pop()))
    without = shelf.files.write(shelf.store.export(voice.id, consents)).exported
    assert without == msgspec.structs.replace(exported, consent=None)


def test_an_export_of_a_damaged_voice(shelf: Shelf, tmp_path: Path) -> None:
    """It fails by itself, and the voice stays in the list."""
    voice = shelf.save("Ada", SECOND, kind="clone")
    (tmp_path / "voices" / f"{voice.id}.safetensors").write_bytes(b"x")
    consents = ConsentStore(shelf.files, shelf.submitted.append, 5)
    with capture_logs(), pytest.raises(JobError, match="could not be exported"):
        shelf.store.on_written(shelf.files.write(shelf.store.export(voice.id, consents)))
    assert (shelf.store.list(), shelf.store.writing) == ([voice], False)


ALICE, BOB, ADMIN, NOBODY = (
    VoiceAccess(owner="alice"),
    VoiceAccess(owner="bob"),
    VoiceAccess(owner="boss", all=True),
    VoiceAccess(),
)


class TestOwners:
    """A voice belongs to the key that made it, unless that key shares it."""

    def test_a_voice_of_another_key_does_not_exist(self, shelf: Shelf) -> None:
        """Every method treats it as one that is not there, with the same words."""
        voice = shelf.save("Ada", SECOND, kind="clone", access=ALICE)
        assert (voice.owner, voice.shared) == ("alice", False)
        consents = ConsentStore(shelf.files, shelf.submitted.append, 5)
        for stranger in (BOB, NOBODY):
            assert shelf.store.find("Ada", stranger) is shelf.store.find(voice.id, stranger) is None

            def uses(name: str, access: VoiceAccess = stranger) -> list[Any]:
                return [
                    lambda: shelf.store.load(name, access),
                    lambda: shelf.store.update(name, name="x", access=access),
                    lambda: shelf.store.delete(name, access),
                    lambda: shelf.store.export(name, consents, access),
                ]

            for hidden, missing in zip(uses(voice.id), uses("voice_none"), strict=True):
                with pytest.raises(JobError) as refused:
                    hidden()
                with pytest.raises(JobError) as absent:
                    missing()
                assert str(refused.value).replace(voice.id, "voice_none") == str(absent.value)
                assert (refused.value.code, refused.value.param) == (absent.value.code, absent.value.param)
        assert not shelf.submitted
        for friend in (ALICE, ADMIN):
            assert shelf.store.find("ada", friend) == voice
            assert shelf.store.load(voice.id, friend).pcm == SECOND

    def test_two_keys_may_use_one_name(self, shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
        """Each means its own voice, also after a restart; an admin tells them apart by their ids."""
        of_alice = shelf.save("Ada", SECOND, kind="clone", access=ALICE)
        of_bob = shelf.save("ada", SECOND, kind="clone", access=BOB)
        for store in (shelf.store, Shelf(tmp_path, clock).store):
            assert (store.find("Ada", ALICE), store.find("Ada", BOB)) == (of_alice, of_bob)
            assert store.find("Ada", ADMIN) is None
            assert store.find(of_bob.id, ADMIN) == of_bob
        with pytest.raises(JobError, match="already"):
            shelf.store.create("ADA", SECOND, kind="clone", access=ALICE)

    def test_own_before_shared(self, shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
        """A shared voice takes no name from a voice that its key does not see. Two shared voices have two names."""
        of_bob = shelf.save("Ada", SECOND, kind="clone", access=BOB)
        clock.advance(1)
        shared = shelf.save("Ada", SECOND, kind="clone", access=ALICE, shared=True)
        for store in (shelf.store, Shelf(tmp_path, clock).store):
            assert store.find("Ada", BOB) == of_bob
            assert store.find("Ada", NOBODY) == store.find("Ada", ADMIN) == shared
        with pytest.raises(JobError, match="already"):
            shelf.store.update(of_bob.id, shared=True, access=BOB)
        with pytest.raises(JobError, match="already"):
            shelf.store.create("ada", SECOND, kind="clone", access=NOBODY)

    def test_shared_and_private_again(self, shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
        """Others speak with a shared voice, and change nothing of it; its owner and an admin may."""
        voice = shelf.save("Ada", SECOND, kind="clone", access=ALICE)
        shelf.store.update(voice.id, name="Eva", access=ALICE)
        shelf.store.update(voice.id, shared=True, access=ALICE)
        shelf.write()
        shared = shelf.write()
        assert (shared.name, shared.shared, shared.owner) == ("Eva", True, "alice")
        assert shelf.store.load(voice.id, BOB).pcm == SECOND
        for change in (
            lambda: shelf.store.update(voice.id, name="Mine", access=BOB),
            lambda: shelf.store.delete(voice.id, NOBODY),
            lambda: shelf.store.export(voice.id, ConsentStore(shelf.files, shelf.submitted.append, 5), BOB),
        ):
            with pytest.raises(JobError) as caught:
                change()
            assert caught.value.code == "insufficient_permissions"
        assert Shelf(tmp_path, clock).store.list() == [shared]
        shelf.store.update(voice.id, shared=False, access=ADMIN)
        shelf.write()
        assert shelf.store.find(voice.id, BOB) is None
        shelf.store.delete(voice.id, ADMIN)
        shelf.write()
        assert shelf.store.list() == []

    def test_without_an_owner(self, shelf: Shelf, tmp_path: Path) -> None:
        """A voice that no key owns is shared and may be changed by all; so is one that an older server saved."""
        voice = shelf.save("Ada", SECOND, kind="clone", access=NOBODY)
        assert (voice.owner, voice.shared) == ("", True)
        path = tmp_path / "voices" / f"{voice.id}.json"
        record = msgspec.json.decode(path.read_bytes())
        del record["owner"], record["shared"]
        path.write_bytes(msgspec.json.encode(record))
        assert Shelf(tmp_path, FakeClock()).store.list() == [voice]
        with pytest.raises(JobError, match="stays shared"):
            shelf.store.update(voice.id, shared=False, access=BOB)
        shelf.store.update(voice.id, name="Eva", access=BOB)
        assert shelf.write().name == "Eva"
