"""The list of recorded consents: which exist, and which are being written.

Owned by the synthesis thread. As with VoiceStore, a change happens when `on_written` gets the report of its write,
and `on_scanned` brings what other processes have changed.
"""

import secrets
import time
from collections.abc import Callable
from typing import Final

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.voices.checks import OutdatedError, check_recording, checked_name, no_room
from gpu_worker.voices.files import CONSENT_PREFIX, VoiceFiles
from gpu_worker.voices.records import ConsentRecord, VoiceWrite, VoiceWritten
from shared.audit import AuditEntry, EventName
from shared.pcm import samples_of
from shared.protocol import ALL_VOICES, VoiceAccess, VoiceConsent
from shared.voice_access import is_visible

MAX_WRITING: Final = 8
"""Consents that wait for the disk at once, of 3 MB at most: a disk that hangs must not fill the memory."""

_RETRY_AFTER_S: Final = 5.0


class ConsentStore:
    """The consents of `files`, at most `max_consents` of them. `submit` hands a write to the thread that writes.

    `wall` gives Unix seconds.
    Each method takes the `access` of its caller: a consent of another key is as if it did not exist.
    """

    def __init__(
        self,
        files: VoiceFiles,
        submit: Callable[[VoiceWrite], None],
        max_consents: int,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._submit = submit
        self._max_consents = max_consents
        self._wall = wall
        self._records: dict[str, ConsentRecord] = {}
        self._scanned: list[ConsentRecord] = []
        self.on_scanned(files.consents())
        self._writing: list[VoiceWrite] = []

    @property
    def writing(self) -> bool:
        """True while a write is pending."""
        return bool(self._writing)

    def on_scanned(self, records: "list[ConsentRecord]") -> None:
        """Take `records` as the list: all consents that are in the folder now."""
        if records is not self._scanned:
            self._scanned = records
            self._records = {record.id: record for record in records}

    def find(self, consent_id: str, access: VoiceAccess = ALL_VOICES) -> VoiceConsent:
        """The consent with that id; JobError `consent_not_found`."""
        return self._record(consent_id, access).to_public()

    def record_of(self, consent_id: str, access: VoiceAccess = ALL_VOICES) -> ConsentRecord | None:
        """The record of the consent with that id; None if it is not kept."""
        record = self._records.get(consent_id)
        return record if record is not None and is_visible(record, access) else None

    def list(self, limit: int, after: str = "", access: VoiceAccess = ALL_VOICES) -> tuple[list[VoiceConsent], bool]:
        """`limit` consents, the newest first, from the one behind `after` on, and whether there are more.

        Raises JobError `consent_not_found` if there is no consent `after`.
        """
        ordered = sorted((record for record in self._records.values() if is_visible(record, access)), key=_age)
        if after:
            last = _age(self._record(after, access))
            ordered = [record for record in ordered if _age(record) > last]
        return [record.to_public() for record in ordered[:limit]], len(ordered) > limit

    def create(
        self,
        name: str,
        language: str,
        pcm: bytes,
        created_at: int | None = None,
        *,
        access: VoiceAccess = ALL_VOICES,
        by: str = "",
    ) -> VoiceWrite:
        """Submit a write that saves `pcm` (24 kHz mono int16 little-endian) as a consent, given now or at `created_at`.

        A file of another server may claim any time: none is later than now. The consent belongs to `access.owner`.
        `by` is the client, for the audit log.

        Raises JobError: `invalid_value`, `invalid_audio`, or `queue_full` if too many consents wait for the disk.
        """
        name = checked_name(name, "consent")
        check_recording(pcm, "recording")
        count = len(self._records) + sum(write.kind == "save" for write in self._writing)
        if count >= self._max_consents:
            raise no_room("consents", count, self._max_consents)
        now = int(self._wall())
        record = ConsentRecord(
            id=f"{CONSENT_PREFIX}{secrets.token_hex(12)}",
            name=name,
            language=language,
            created_at=now if created_at is None else min(created_at, now),
            samples=samples_of(pcm),
            owner=access.owner,
        )
        return self._write(VoiceWrite(kind="save", record=record, pcm=pcm), "consent.recorded", by)

    def rename(self, consent_id: str, name: str, access: VoiceAccess = ALL_VOICES, *, by: str = "") -> VoiceWrite:
        """Submit a write that gives a consent another name. Raises JobError: `consent_not_found`, `invalid_value`."""
        kept = self._record(consent_id, access)
        record = msgspec.structs.replace(kept, name=checked_name(name, "consent"))
        return self._write(VoiceWrite(kind="update", record=record), "consent.renamed", by, was=kept.name)

    def delete(self, consent_id: str, access: VoiceAccess = ALL_VOICES, *, by: str = "") -> VoiceWrite:
        """Submit a write that deletes the consent with that id; JobError `consent_not_found`."""
        return self._write(VoiceWrite(kind="delete", record=self._record(consent_id, access)), "consent.deleted", by)

    def on_written(self, report: VoiceWritten) -> VoiceConsent:
        """Carry out a finished write in the list, and return its consent.

        Raises the report's JobError, which is `consent_not_found` if an earlier write has deleted the consent.
        """
        self._writing.remove(report.write)
        record = report.write.record
        if report.error is not None:
            raise report.error
        if not isinstance(record, ConsentRecord):
            raise TypeError("the write of a voice")
        if report.write.kind == "delete":
            return self._records.pop(record.id, record).to_public()
        self._records[record.id] = record
        return record.to_public()

    def _write(self, write: VoiceWrite, event: EventName, by: str, was: str = "") -> VoiceWrite:
        if len(self._writing) >= MAX_WRITING:
            message = f"{len(self._writing)} consents wait for the disk already"
            raise JobError("queue_full", message, retry_after_s=_RETRY_AFTER_S)
        record = write.record
        entry = AuditEntry(event=event, by=by, id=record.id, name=record.name, was=was, owner=record.owner)
        write = msgspec.structs.replace(write, audit=(entry,))
        self._writing.append(write)
        self._submit(write)
        return write

    def _record(self, consent_id: str, access: VoiceAccess) -> ConsentRecord:
        record = self.record_of(consent_id, access)
        if record is None:
            raise OutdatedError("consent_not_found", f"there is no consent {consent_id!r}", param="consent")
        return record


def _age(record: ConsentRecord) -> tuple[int, str]:
    """The key of the order of the list; unlike the time alone, it is the same after a restart."""
    return -record.created_at, record.id
