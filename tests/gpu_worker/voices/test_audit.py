"""The audit log of saved voices: a line for each change, before it; without a line, no change."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.voices import ConsentStore, VoiceFiles, VoiceStore, VoiceWrite
from shared.audit import AuditEntry, AuditError
from shared.protocol import SavedVoice, VoiceAccess, VoiceConsent

SECOND = bytes(range(240)) * 200
"""One second of sound, 24,000 samples, not silent."""

ALICE = VoiceAccess(owner="alice")


class Archive:
    """Stores over real files, whose audit log is a list; it can be broken."""

    def __init__(self, folder: Path) -> None:
        self.log: list[dict[str, Any]] = []
        self.is_broken = False
        files = VoiceFiles(folder, self.append)
        self._files = files
        self._submitted: list[VoiceWrite] = []
        self.voices = VoiceStore(files, self._submitted.append, 5)  # type: ignore[arg-type] # only writes come
        self.consents = ConsentStore(files, self._submitted.append, 5)

    def append(self, entries: Sequence[AuditEntry]) -> None:
        """The function that writes the log."""
        if self.is_broken:
            raise AuditError("the disk is full")
        self.log += msgspec.to_builtins(entries)

    def write(self) -> SavedVoice | VoiceConsent:
        """Carry out the oldest write that was submitted."""
        write = self._submitted.pop(0)
        store = self.voices if write.noun == "voice" else self.consents
        return store.on_written(self._files.write(write))


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Empty stores."""
    return Archive(tmp_path)


def test_each_change_has_its_line(archive: Archive) -> None:
    """Who did what to which voice, with which consent, under which names."""
    archive.consents.create("Ada L.", "en", SECOND, by="key:alice")
    consent = archive.write()
    archive.voices.create(
        "Ada", SECOND, kind="clone", consent=consent.id, description="secret", access=ALICE, by="key:alice"
    )
    voice = archive.write()
    archive.voices.update(voice.id, name="Eva", shared=True, by="key:boss")
    archive.voices.update(voice.id, shared=False, by="key:alice")
    archive.voices.update(voice.id, name="Eva", by="key:alice")
    for _ in range(3):
        archive.write()
    archive.voices.export(voice.id, archive.consents, by="key:alice")
    archive.voices.delete(voice.id, by="key:alice")
    archive.voices.create("Bob", SECOND, kind="design", by="peer:127.0.0.1")
    archive.voices.create("Cid", SECOND, kind="design", is_imported=True, by="peer:127.0.0.1")
    for _ in range(4):
        archive.write()
    archive.consents.rename(consent.id, "Ada Lovelace", by="key:alice")
    archive.write()
    archive.consents.delete(consent.id, by="key:alice")
    archive.write()
    of_voice = {"id": voice.id, "owner": "alice", "consent": consent.id}
    bob, cid = archive.voices.list()
    assert archive.log == [
        {"event": "consent.recorded", "by": "key:alice", "id": consent.id, "name": "Ada L."},
        {"event": "voice.cloned", "by": "key:alice", "name": "Ada", **of_voice},
        {"event": "voice.renamed", "by": "key:boss", "name": "Eva", "was": "Ada", **of_voice},
        {"event": "voice.shared", "by": "key:boss", "name": "Eva", **of_voice},
        {"event": "voice.unshared", "by": "key:alice", "name": "Eva", **of_voice},
        {"event": "voice.exported", "by": "key:alice", "name": "Eva", **of_voice},
        {"event": "voice.deleted", "by": "key:alice", "name": "Eva", **of_voice},
        {"event": "voice.designed", "by": "peer:127.0.0.1", "id": bob.id, "name": "Bob"},
        {"event": "voice.imported", "by": "peer:127.0.0.1", "id": cid.id, "name": "Cid"},
        {"event": "consent.renamed", "by": "key:alice", "id": consent.id, "name": "Ada Lovelace", "was": "Ada L."},
        {"event": "consent.deleted", "by": "key:alice", "id": consent.id, "name": "Ada Lovelace"},
    ]


def test_without_a_line_there_is_no_change(archive: Archive, tmp_path: Path) -> None:
    """A log that cannot be written refuses every change, and says so to the client."""
    archive.voices.create("Ada", SECOND, kind="clone")
    voice = archive.write()
    before = sorted((path.name, path.read_bytes()) for path in tmp_path.glob("*.*"))
    archive.is_broken = True
    archive.voices.create("Bob", SECOND, kind="clone")
    archive.voices.update(voice.id, name="Eva")
    archive.voices.export(voice.id, archive.consents)
    archive.voices.delete(voice.id)
    for _ in range(4):
        with pytest.raises(JobError, match=r"the audit log cannot be written \(the disk is full\)") as refused:
            archive.write()
        assert refused.value.code == "internal_error"
    assert archive.voices.list() == [voice]
    assert sorted((path.name, path.read_bytes()) for path in tmp_path.glob("*.*")) == before
    assert not archive.voices.writing


def test_a_change_that_fails_has_a_second_line(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line was there before: the second says that nothing came of it, and why."""
    archive.voices.create("Ada", SECOND, kind="clone", by="key:alice")

    def full(_path: Path, *_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(JobError, match="No space left"):
        archive.write()
    tried, failed = archive.log
    assert failed == {**tried, "failed": "the voice could not be saved: No space left on device"}
