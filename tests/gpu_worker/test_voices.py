"""Saved voices are on the disk whole or not at all, and found again after a restart."""

import logging
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.voices import MAX_NAME_CHARS, RECENT, VoiceStore
from shared.protocol import SavedVoice
from tests.gpu_worker.fakes import FakeClock

SECOND = bytes(range(240)) * 200
"""One second of sound that is not silence: 24,000 samples."""


@pytest.fixture
def clock() -> FakeClock:
    """Unix seconds."""
    return FakeClock()


@pytest.fixture
def store(tmp_path: Path, clock: FakeClock) -> VoiceStore:
    """An empty store in a folder that does not exist yet."""
    return open_store(tmp_path, clock)


def open_store(tmp_path: Path, clock: FakeClock, max_voices: int = 5) -> VoiceStore:
    """The store as a new process finds it."""
    return VoiceStore(tmp_path / "voices", max_voices, reserved=["Alloy", "ryan"], wall=clock)


def files(tmp_path: Path) -> set[str]:
    """The endings of what lies in the store's folder."""
    return {"".join(path.suffixes) for path in (tmp_path / "voices").glob("*")}


def test_saved_voice_is_told(store: VoiceStore) -> None:
    """A voice is described by what was given: its length, its kind, and whether its transcript is known."""
    voice = store.create("Ada", SECOND, kind="clone", text="Hello.", description="my aunt", consent="yes")
    assert voice == SavedVoice(
        id=voice.id,
        name="Ada",
        kind="clone",
        created_at=1000,
        seconds=1.0,
        in_context=True,
        description="my aunt",
    )
    assert store.find(voice.id) == voice
    assert store.list() == [voice]
    assert len(store) == 1


def test_recording_is_bit_identical(store: VoiceStore) -> None:
    """What is loaded is what was saved, keyed by the voice's id; the transcript decides how it is cloned."""
    in_context = store.create("Ada", SECOND, kind="clone", text="Hello.")
    embedded = store.create("Bob", SECOND[:24_000], kind="design")
    assert store.load(in_context.id) == Reference(key=in_context.id, pcm=SECOND, text="Hello.", x_vector_only=False)
    assert store.load(embedded.id) == Reference(key=embedded.id, pcm=SECOND[:24_000], text=None, x_vector_only=True)
    assert not embedded.in_context


def test_survives_a_restart(store: VoiceStore, tmp_path: Path, clock: FakeClock) -> None:
    """A new process finds every voice, the oldest first, with all that was said of it."""
    voices = []
    for name in ("Zoe", "Ada", "Mia"):
        voices.append(store.create(name, SECOND, kind="clone", text="Hello."))
        clock.advance(1)
    again = open_store(tmp_path, clock)
    assert again.list() == voices
    assert again.load(voices[1].id) == store.load(voices[1].id)


def test_consent_is_kept(store: VoiceStore, tmp_path: Path) -> None:
    """What was said of the speaker's consent stays on the disk beside the recording."""
    voice = store.create("Ada", SECOND, kind="clone", consent="recorded 2026-01-01")
    assert "recorded 2026-01-01" in (tmp_path / "voices" / f"{voice.id}.json").read_text()


def test_found_by_id_or_name(store: VoiceStore) -> None:
    """A voice is found by its id and by its name, case aside, and by nothing else."""
    voice = store.create("Änne", SECOND, kind="clone")
    for name in (voice.id, voice.id.upper(), "änne", " ÄNNE ", "A\u0308nne"):
        assert store.find(name) == voice
    assert store.find("Anne") is None


@pytest.mark.parametrize(
    "name",
    ["", "  ", "x" * (MAX_NAME_CHARS + 1), "two\nlines", "nul\0", "\u202eright to left", "\u200d", "alloy", " RYAN "],
)
def test_names_that_will_not_do(store: VoiceStore, name: str, tmp_path: Path) -> None:
    """A name is short, printable and no preset voice's; a refused one leaves nothing on the disk."""
    with pytest.raises(JobError) as caught:
        store.create(name, SECOND, kind="clone")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "name")
    assert not (tmp_path / "voices").exists()


def test_names_are_unique(store: VoiceStore) -> None:
    """Two voices cannot bear one name, case aside, nor one the id of the other."""
    voice = store.create("Ada", SECOND, kind="clone")
    for name in ("ada", "ADA ", "A\u200dda", voice.id):
        with pytest.raises(JobError, match="already"):
            store.create(name, SECOND, kind="clone")


def test_names_are_no_paths(store: VoiceStore, tmp_path: Path) -> None:
    """A name that looks like a path is a name, and an id that looks like one is no voice."""
    voice = store.create("../../evil", SECOND, kind="clone")
    assert {path.name for path in tmp_path.iterdir()} == {"voices"}
    assert all(path.stem == voice.id for path in (tmp_path / "voices").iterdir())
    with pytest.raises(JobError) as caught:
        store.load("../../evil")
    assert caught.value.code == "voice_not_found"


def test_bounded_in_number(tmp_path: Path, clock: FakeClock) -> None:
    """No more than so many are kept; deleting one makes room."""
    store = open_store(tmp_path, clock, max_voices=2)
    first = store.create("a", SECOND, kind="clone")
    store.create("b", SECOND, kind="clone")
    with pytest.raises(JobError, match="delete one first") as caught:
        store.create("c", SECOND, kind="clone")
    assert caught.value.code == "invalid_value"
    store.delete(first.id)
    store.create("c", SECOND, kind="clone")


@pytest.mark.parametrize(
    "name", ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\U0001f468\u200d\U0001f469\u200d\U0001f467"]
)
def test_names_of_joined_characters(store: VoiceStore, name: str) -> None:
    """Persian words and emoji that need an invisible joiner are names, kept as they are written."""
    voice = store.create(name, SECOND, kind="clone")
    assert voice.name == name
    assert store.find(name) == voice


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
    store: VoiceStore, pcm: bytes, text: str | None, code: str, param: str
) -> None:
    """Nothing, half a sample, a moment, an hour, a click in silence, or a text nobody says so fast: never kept."""
    with pytest.raises(JobError) as caught:
        store.create("Ada", pcm, kind="clone", text=text)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert store.list() == []


def test_designed_silence_is_the_models_fault(store: VoiceStore) -> None:
    """Where the model said nothing, the client did nothing wrong."""
    with pytest.raises(JobError, match="silent") as caught:
        store.create("Ada", bytes(48_000), kind="design")
    assert caught.value.code == "synthesis_failed"


def test_recent_recordings_are_not_read_again(store: VoiceStore, tmp_path: Path) -> None:
    """A voice that speaks often costs the disk nothing, until so many others have spoken since."""
    voices = [store.create(name, SECOND, kind="clone") for name in "abcde"]
    loaded = store.load(voices[0].id)
    for path in (tmp_path / "voices").glob("*.safetensors"):
        path.rename(path.with_suffix(".away"))
    assert store.load(voices[0].id) is loaded
    for path in (tmp_path / "voices").glob("*.away"):
        path.rename(path.with_suffix(".safetensors"))
    for voice in voices[1 : RECENT + 1]:
        store.load(voice.id)
    again = store.load(voices[0].id)
    assert again == loaded
    assert again is not loaded


def test_deleted(store: VoiceStore, tmp_path: Path, clock: FakeClock) -> None:
    """A deleted voice is gone from the list, the disk and the next process, and its name is free."""
    voice = store.create("Ada", SECOND, kind="clone")
    assert store.delete(voice.id) == voice
    assert store.list() == open_store(tmp_path, clock).list() == []
    assert files(tmp_path) == set()
    for act in (store.load, store.delete):
        with pytest.raises(JobError) as caught:
            act(voice.id)
        assert caught.value.code == "voice_not_found"
    store.create("Ada", SECOND, kind="clone")


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
    store: VoiceStore, tmp_path: Path, clock: FakeClock, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged voice is named in the log and left where it is; the others are there."""
    broken = store.create("Ada", SECOND, kind="clone")
    whole = store.create("Bob", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{broken.id}.json")
    with caplog.at_level(logging.WARNING):
        assert open_store(tmp_path, clock).list() == [whole]
    assert broken.id in caplog.text
    assert (tmp_path / "voices" / f"{broken.id}.json").exists()


@pytest.mark.parametrize("damage", [truncated, foreign, missing])
def test_damaged_while_running(store: VoiceStore, tmp_path: Path, damage: Any) -> None:
    """A recording that is damaged under a running process is an error of that request alone."""
    voice = store.create("Ada", SECOND, kind="clone")
    damage(tmp_path / "voices" / f"{voice.id}.json")
    with pytest.raises(JobError, match="damaged") as caught:
        store.load(voice.id)
    assert caught.value.code == "voice_not_found"


def test_two_of_one_name_on_the_disk(store: VoiceStore, tmp_path: Path, clock: FakeClock) -> None:
    """Of two voices that somebody gave one name by hand, the older is there."""
    first = store.create("Ada", SECOND, kind="clone")
    clock.advance(1)
    second = store.create("Bob", SECOND, kind="clone")
    path = tmp_path / "voices" / f"{second.id}.json"
    path.write_text(path.read_text().replace("Bob", "ADA"))
    assert open_store(tmp_path, clock).list() == [first]


def test_death_while_writing(store: VoiceStore, tmp_path: Path, clock: FakeClock) -> None:
    """What a process left that died while it saved a voice is no voice, and does not stay for ever."""
    voice = store.create("Ada", SECOND, kind="clone")
    path = tmp_path / "voices" / f"{voice.id}.json"
    path.rename(path.with_name(path.name + ".part"))
    again = open_store(tmp_path, clock)
    assert again.list() == []
    assert files(tmp_path) == set()
    again.create("Ada", SECOND, kind="clone")


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_disk_that_is_full(
    store: VoiceStore, tmp_path: Path, clock: FakeClock, call: int, monkeypatch: pytest.MonkeyPatch
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
        store.create("Ada", SECOND, kind="clone")
    assert caught.value.code == "synthesis_failed"
    assert store.list() == open_store(tmp_path, clock).list() == []
    assert files(tmp_path) == set()
    monkeypatch.undo()
    store.create("Ada", SECOND, kind="clone")
