"""ConsentStore over real files: a consent is on the disk whole or not at all, and a restart finds it again."""

import os
from functools import partial
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpu_worker.engines.base import JobError
from gpu_worker.voices import ConsentStore, VoiceFiles, VoiceStore, VoiceWrite
from gpu_worker.voices.consents import MAX_WRITING
from shared.protocol import ALL_VOICES, VoiceAccess, VoiceConsent
from tests.gpu_worker.fakes import FakeClock

SECOND = bytes(range(240)) * 200
"""One second of sound, not silent."""


class Shelf:
    """A ConsentStore over real files. Its writes wait in `submitted` until a test carries them out."""

    def __init__(self, tmp_path: Path, clock: FakeClock, max_consents: int = 50) -> None:
        self.files = VoiceFiles(tmp_path / "voices")
        self.submitted: list[VoiceWrite] = []
        self.store = ConsentStore(self.files, self.submitted.append, max_consents, wall=clock)

    def save(self, name: str, language: str = "en-US") -> VoiceConsent:
        """Create a consent and write it at once."""
        self.store.create(name, language, SECOND)
        return self.write()

    def write(self) -> VoiceConsent:
        """Carry out the oldest submitted write and report it."""
        return self.store.on_written(self.files.write(self.submitted.pop(0)))


@pytest.fixture
def clock() -> FakeClock:
    """Unix seconds."""
    return FakeClock()


@pytest.fixture
def shelf(tmp_path: Path, clock: FakeClock) -> Shelf:
    """An empty store whose folder does not exist yet."""
    return Shelf(tmp_path, clock)


def test_a_consent_is_kept_beside_the_voices(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """Its record and its recording are in a folder of their own, and a restart finds them; no voice is made of it."""
    consent = shelf.save(" Ada ", "de")
    assert consent == VoiceConsent(id=consent.id, name="Ada", language="de", created_at=1000)
    kept = {path.name for path in (tmp_path / "voices" / "consents").iterdir()}
    assert kept == {f"{consent.id}.json", f"{consent.id}.safetensors"}
    assert shelf.files.recording(consent.id) == SECOND
    assert Shelf(tmp_path, clock).store.find(consent.id) == consent
    with capture_logs() as logged:
        assert VoiceStore(shelf.files, shelf.submitted.append, 5).list() == []
    assert not logged


def test_the_time_of_another_server(shelf: Shelf) -> None:
    """An imported consent keeps its time, unless that is yet to come."""
    found = [shelf.store.create("Ada", "de", SECOND, created_at) for created_at in (0, 999, 2**64 - 1)]
    assert [write.record.created_at for write in found] == [0, 999, 1000]


def test_pages(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """Pages follow each other without a gap, the newest first, of one second too, and after a restart."""
    consents = []
    for index in range(7):
        consents.append(shelf.save(f"consent {index}"))
        clock.advance(index % 2)
    newest_first = [consent.created_at for consent in consents][::-1]
    for store in (shelf.store, Shelf(tmp_path, clock).store):
        found: list[VoiceConsent] = []
        more = True
        while more:
            page, more = store.list(3, found[-1].id if found else "")
            assert len(page) == (3 if more else 1)
            found += page
        assert [consent.created_at for consent in found] == newest_first
        assert sorted(consent.id for consent in found) == sorted(consent.id for consent in consents)
        assert store.list(7) == (found, False)
    with pytest.raises(JobError) as caught:
        shelf.store.list(3, "cons_none")
    assert caught.value.code == "consent_not_found"


def test_rename_and_delete(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """A new name and a deletion count when the disk has taken them, and survive a restart."""
    consent = shelf.save("Ada")
    shelf.store.rename(consent.id, "Eva")
    assert shelf.store.writing
    assert shelf.store.find(consent.id).name == "Ada"
    assert shelf.write().name == "Eva"
    assert not shelf.store.writing
    assert Shelf(tmp_path, clock).store.find(consent.id).name == "Eva"
    shelf.store.delete(consent.id)
    assert shelf.write().id == consent.id
    for store in (shelf.store, Shelf(tmp_path, clock).store):
        assert store.list(5) == ([], False)
    assert list((tmp_path / "voices" / "consents").iterdir()) == []


def test_changes_after_a_deletion(shelf: Shelf, tmp_path: Path) -> None:
    """A rename behind a deletion leaves no file, and is told that there is no such consent."""
    consent = shelf.save("Ada")
    shelf.store.delete(consent.id)
    shelf.store.delete(consent.id)
    shelf.store.rename(consent.id, "Eva")
    shelf.write()
    for _ in range(2):
        with pytest.raises(JobError) as caught:
            shelf.write()
        assert caught.value.code == "consent_not_found"
    assert list((tmp_path / "voices" / "consents").iterdir()) == []
    assert not shelf.store.writing


@pytest.mark.parametrize("name", ["", "\u200d", "two\nlines", "x" * 65, "../../evil\0"])
def test_refused_names(shelf: Shelf, name: str) -> None:
    """The name of a consent follows the rules of a voice's name."""
    with pytest.raises(JobError) as caught:
        shelf.save(name)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "name")


@pytest.mark.parametrize("pcm", [b"", SECOND[:100], bytes(48_000)])
def test_refused_recordings(shelf: Shelf, pcm: bytes) -> None:
    """A consent that cannot be heard is none."""
    with pytest.raises(JobError) as caught:
        shelf.store.create("Ada", "en", pcm)
    assert (caught.value.code, caught.value.param) == ("invalid_audio", "recording")


def test_limits(tmp_path: Path, clock: FakeClock) -> None:
    """The store takes at most `max_consents`, and few writes at once."""
    shelf = Shelf(tmp_path, clock, max_consents=MAX_WRITING + 1)
    for index in range(MAX_WRITING):
        shelf.store.create(f"consent {index}", "en", SECOND)
    with pytest.raises(JobError) as caught:
        shelf.store.create("one more", "en", SECOND)
    assert caught.value.code == "queue_full"
    for _ in range(MAX_WRITING):
        shelf.write()
    shelf.save("one more")
    with pytest.raises(JobError, match="delete one first"):
        shelf.save("too many")


def test_a_disk_that_refuses(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change that the disk does not take does not happen; the message is about a consent."""
    consent = shelf.save("Ada")
    shelf.store.rename(consent.id, "Eva")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JobError, match="the consent could not be changed"):
        shelf.write()
    assert shelf.store.find(consent.id).name == "Ada"


def test_a_consent_of_another_key_does_not_exist(shelf: Shelf, tmp_path: Path, clock: FakeClock) -> None:
    """It is not listed, found, changed, or exported with a voice that names it; its owner and admins have it."""
    alice, bob, nobody = VoiceAccess(owner="alice"), VoiceAccess(owner="bob"), VoiceAccess()
    shelf.store.create("Ada", "en", SECOND, access=alice)
    own = shelf.write()
    shelf.store.create("Old", "en", SECOND, access=nobody)
    everyones = shelf.write()
    for store in (shelf.store, Shelf(tmp_path, clock).store):
        for stranger in (bob, nobody):
            assert store.list(9, access=stranger) == ([everyones], False)
            assert store.record_of(own.id, stranger) is None
            for use in (
                store.find,
                partial(store.list, 9),
                partial(store.rename, name="x"),
                store.delete,
            ):
                errors = []
                for name in (own.id, "cons_none"):
                    with pytest.raises(JobError) as caught:
                        use(name, access=stranger)
                    errors.append((caught.value.code, str(caught.value).replace(own.id, "cons_none")))
                assert errors[0] == errors[1]
        for friend in (alice, ALL_VOICES):
            assert {consent.id for consent in store.list(9, access=friend)[0]} == {own.id, everyones.id}
    voices = VoiceStore(shelf.files, shelf.submitted.append, 5)  # type: ignore[arg-type] # only writes come
    voices.create("Bob's", SECOND, kind="clone", consent=own.id, access=bob)
    voice = voices.on_written(shelf.files.write(shelf.submitted.pop()))
    for access, has_consent in ((bob, False), (ALL_VOICES, True)):
        exported = shelf.files.write(voices.export(voice.id, shelf.store, access)).exported
        assert exported is not None
        assert (exported.consent is not None) == has_consent
