"""The list of saved voices: which exist, which are being written, and which names are free.

Owned by the synthesis thread. VoiceStore writes no file: it submits VoiceWrites to a thread of the caller,
and a voice appears or disappears when `on_written` gets the report. `on_scanned` brings what other
processes have changed. The synthesis thread reads the disk only for the recording of a voice, and for the
record of an id that is not listed.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Final, Literal

import msgspec
import safetensors
import structlog

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.voices.checks import (
    OutdatedError,
    check_recording,
    check_transcript,
    checked_name,
    is_name_taken,
    name_taken,
    no_room,
)
from gpu_worker.voices.consents import ConsentStore
from gpu_worker.voices.files import ID_PREFIX, VoiceFiles
from gpu_worker.voices.records import VoiceRecord, VoiceWrite, VoiceWritten
from shared.audit import AuditEntry, EventName
from shared.pcm import samples_of
from shared.protocol import ALL_VOICES, CacheStats, SavedVoice, VoiceAccess
from shared.voice_access import find_voice, folded, is_changeable, is_visible

CACHED_RECORDINGS: Final = 4
"""Recordings kept in memory, of 3 MB at most: reading one holds up the synthesis thread for 2.5 ms."""

MAX_SAVING: Final = 8
"""Voices that wait for the disk at once, of 3 MB at most: a disk that hangs must not fill the memory."""

_RETRY_AFTER_S: Final = 5.0

log = structlog.get_logger(__name__)


class VoiceStore:
    """The voices of `files`, at most `max_voices` of them. `submit` hands a write to the thread that writes.

    `reserved` are names with another meaning (preset voices, OpenAI's names). `wall` gives Unix seconds.
    Each method takes the `access` of its caller: a voice that the caller does not see is as if it did not exist.
    `by` is the caller, for the audit log.
    """

    def __init__(
        self,
        files: VoiceFiles,
        submit: Callable[[VoiceWrite], None],
        max_voices: int,
        reserved: Collection[str] = (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self._submit = submit
        self._max_voices = max_voices
        self._reserved = {folded(name) for name in reserved}
        self._wall = wall
        self._records: dict[str, VoiceRecord] = {}
        self._saving: dict[str, VoiceRecord] = {}
        self._renaming: list[VoiceRecord] = []  # with their new names
        self._deleting: list[str] = []  # an id stands here once for every pending delete of it
        self._exporting: list[VoiceWrite] = []
        self._recordings: OrderedDict[str, Reference] = OrderedDict()
        self._hits = self._misses = 0
        self._scanned: list[VoiceRecord] = []
        self.on_scanned(files.records())

    @property
    def writing(self) -> bool:
        """True while a write is pending."""
        return bool(self._saving or self._renaming or self._deleting or self._exporting)

    def on_scanned(self, records: list[VoiceRecord]) -> None:
        """Take `records`, the oldest first, as the list: all voices that are in the folder now.

        A volume without locks allows two voices of one name: the name means neither of them, and their ids do.
        """
        if records is self._scanned:
            return
        before, self._scanned, self._records = self._records, records, {}
        places = {voice_id: place for place, voice_id in enumerate(before)}  # of voices of one second
        named: dict[str, list[VoiceRecord]] = {}
        for record in sorted(records, key=lambda record: (record.created_at, places.get(record.id, len(places)))):
            others = named.setdefault(folded(record.name), [])
            if record.id not in before and any(_is_twice(record, other) for other in others):
                log.warning("saved_voice_name_taken", voice=record.id, name=record.name)
            others.append(record)
            self._records[record.id] = record
        for voice_id in self._recordings.keys() - self._records.keys():
            del self._recordings[voice_id]

    def list(self) -> list[SavedVoice]:
        """Every voice, the oldest first."""
        return [record.to_public() for record in self._records.values()]

    def find(self, name: str, access: VoiceAccess = ALL_VOICES) -> SavedVoice | None:
        """The voice that the caller means by that id or name, ignoring case."""
        record = find_voice(name, self._records.values(), access)
        return None if record is None else record.to_public()

    def create(
        self,
        name: str,
        pcm: bytes,
        *,
        kind: Literal["clone", "design"],
        text: str | None = None,
        prompt: str = "",
        description: str = "",
        consent: str = "",
        access: VoiceAccess = ALL_VOICES,
        shared: bool = False,
        is_imported: bool = False,
        by: str = "",
    ) -> VoiceWrite:
        """Submit a write that saves `pcm` (24 kHz mono int16 little-endian) as a voice. Its name is taken from now on.

        It belongs to `access.owner`; without an owner it is shared.

        With `text`, its transcript, the voice will be cloned in context, else from its speaker embedding alone.
        `prompt` is what it was designed from.

        Raises:
            JobError: as `check_new`. `invalid_audio` or `invalid_value` if no voice can be cloned from the recording
                or `text` is too long to be its transcript; `synthesis_failed` instead if the recording was designed.
        """
        name = self.check_new(name, access)
        try:
            check_recording(pcm, "audio_sample")
            check_transcript(text or "", pcm)
        except JobError as error:
            if kind == "clone":
                raise
            message = f"the model made no voice of this description ({error.message}); try again"
            raise JobError("synthesis_failed", message) from error
        record = VoiceRecord(
            id=f"{ID_PREFIX}{secrets.token_hex(12)}",
            name=name,
            kind=kind,
            created_at=int(self._wall()),
            samples=samples_of(pcm),
            text=text,
            prompt=prompt,
            description=description,
            consent=consent,
            owner=access.owner,
            shared=shared or not access.owner,
        )
        self._saving[record.id] = record
        event: EventName = "voice.cloned" if kind == "clone" else "voice.designed"
        audit = (_entry("voice.imported" if is_imported else event, record, by),)
        write = VoiceWrite(kind="save", record=record, pcm=pcm, audit=audit)
        self._submit(write)
        return write

    def check_new(self, name: str, access: VoiceAccess = ALL_VOICES) -> str:
        """`name` in the form in which a new voice of `access.owner` would get it.

        Raises:
            JobError: `invalid_value` if the name is not allowed or there are too many voices,
                `queue_full` if too many voices wait for the disk.
        """
        name = self._free_name(name, access.owner)
        count = len(self._records) + len(self._saving)
        if count >= self._max_voices:
            raise no_room("saved voices", count, self._max_voices)
        _check_waiting(self._saving)
        return name

    def update(
        self,
        voice_id: str,
        *,
        name: str | None = None,
        shared: bool | None = None,
        access: VoiceAccess = ALL_VOICES,
        by: str = "",
    ) -> VoiceWrite:
        """Submit a write that gives the voice with that id another name, which is taken from now on, or shares it.

        Raises JobError: `voice_not_found`, `insufficient_permissions`, `invalid_value` if the name is not allowed or
        the voice has no owner to be private to, `queue_full`.
        """
        kept = self._changeable(voice_id, access)
        kept = next((record for record in reversed(self._renaming) if record.id == voice_id), kept)
        if shared is False and not kept.owner:
            raise JobError("invalid_value", "no key owns this voice, so it stays shared", param="shared")
        shared = kept.shared if shared is None else shared
        # A voice that is to be shared needs a name that no shared voice has.
        name = self._free_name(kept.name if name is None else name, kept.owner, but=voice_id)
        record = msgspec.structs.replace(kept, name=name, shared=shared)
        _check_waiting(self._renaming)
        self._renaming.append(record)
        audit = [_entry("voice.renamed", record, by, was=kept.name)] if record.name != kept.name else []
        if record.shared != kept.shared:
            audit.append(_entry("voice.shared" if record.shared else "voice.unshared", record, by))
        write = VoiceWrite(kind="update", record=record, audit=tuple(audit))
        self._submit(write)
        return write

    def export(
        self, voice_id: str, consents: ConsentStore, access: VoiceAccess = ALL_VOICES, *, by: str = ""
    ) -> VoiceWrite:
        """Submit the reading of the voice with that id.

        Raises JobError: `voice_not_found`, `insufficient_permissions`, `queue_full`.
        """
        record = self._changeable(voice_id, access)
        _check_waiting(self._exporting)
        audit = (_entry("voice.exported", record, by),)
        write = VoiceWrite(
            kind="export", record=record, consent=consents.record_of(record.consent, access), audit=audit
        )
        self._exporting.append(write)
        self._submit(write)
        return write

    def _free_name(self, name: str, owner: str, but: str = "") -> str:
        """`name` in the form in which a voice of `owner` gets it.

        Raises JobError if another voice that `owner` sees, than the one with id `but`, has it.
        """
        name = checked_name(name, "voice")
        if folded(name) in self._reserved:
            raise JobError("invalid_value", f"{name!r} is the name of a preset voice", param="name")
        if is_name_taken(name, owner, [*self._saving.values(), *self._renaming], but):
            raise name_taken(name)
        if is_name_taken(name, owner, self._records.values(), but):
            raise name_taken(name, OutdatedError)
        return name

    def delete(self, voice_id: str, access: VoiceAccess = ALL_VOICES, *, by: str = "") -> VoiceWrite:
        """Submit a write that deletes the voice with that id.

        Raises JobError: `voice_not_found`, `insufficient_permissions`.
        """
        record = _require_changeable(self._record(voice_id, access), access)
        write = VoiceWrite(kind="delete", record=record, audit=(_entry("voice.deleted", record, by),))
        self._deleting.append(voice_id)
        self._submit(write)
        return write

    def on_written(self, report: VoiceWritten) -> SavedVoice:
        """Carry out a finished write in the list, and return its voice.

        Raises the report's JobError, which is `voice_not_found` if an earlier write has deleted the voice.
        """
        write, record = report.write, report.write.record
        if not isinstance(record, VoiceRecord):
            raise TypeError("the write of a consent")
        if write.kind == "save":
            del self._saving[record.id]
        elif write.kind == "update":
            self._renaming.remove(record)
        elif write.kind == "export":
            self._exporting.remove(write)
        else:
            self._deleting.remove(record.id)
        if report.error is not None:
            raise report.error
        if write.kind == "delete":
            record = self._records.pop(record.id, record)
            self._recordings.pop(record.id, None)
        elif write.kind != "export":
            self._records[record.id] = record
        return record.to_public()

    def load(self, voice_id: str, access: VoiceAccess = ALL_VOICES) -> Reference:
        """The recording of the voice with that id. Ids are never reused, so the id is the `key` of the Reference.

        Raises JobError `voice_not_found`, also if the recording was damaged since the start; the log has the cause.
        """
        record = self._record(voice_id, access)
        if voice_id in self._recordings:
            self._hits += 1
            self._recordings.move_to_end(voice_id)
            return self._recordings[voice_id]
        self._misses += 1
        try:
            pcm = self._files.recording(voice_id)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            if voice_id in self._deleting:
                raise _not_found(voice_id) from error
            log.exception("saved_voice_damaged", voice=voice_id)
            message = f"the recording of the voice {record.name!r} is damaged; delete it and save it again"
            raise JobError("voice_not_found", message, param="voice") from error
        reference = Reference(key=record.id, pcm=pcm, text=record.text, x_vector_only=record.text is None)
        self._recordings[voice_id] = reference
        if len(self._recordings) > CACHED_RECORDINGS:
            self._recordings.popitem(last=False)
        return reference

    def _changeable(self, voice_id: str, access: VoiceAccess) -> VoiceRecord:
        """The record of a voice that the caller may change; one with a pending delete counts as deleted."""
        if voice_id in self._deleting:
            raise _not_found(voice_id)
        return _require_changeable(self._record(voice_id, access), access)

    def cache_stats(self) -> CacheStats:
        """The recordings that are kept in host RAM."""
        return CacheStats(
            name="recordings",
            entries=len(self._recordings),
            bytes=sum(len(recording.pcm) for recording in self._recordings.values()),
            hits=self._hits,
            misses=self._misses,
        )

    def empty_cache(self) -> None:
        """Forget the recordings that are kept in host RAM; the next requests read them again."""
        self._recordings.clear()

    def _record(self, voice_id: str, access: VoiceAccess = ALL_VOICES) -> VoiceRecord:
        record = self._records.get(voice_id) or self._files.record(voice_id)
        if record is None or not is_visible(record, access):
            raise _not_found(voice_id)
        return record


def _check_waiting(waiting: Collection[object]) -> None:
    """JobError `queue_full` if as many voices wait for the disk as may."""
    if len(waiting) >= MAX_SAVING:
        raise JobError("queue_full", f"{len(waiting)} voices wait for the disk already", retry_after_s=_RETRY_AFTER_S)


def _not_found(voice_id: str) -> JobError:
    return OutdatedError("voice_not_found", f"there is no saved voice {voice_id!r}", param="voice")


def _entry(event: EventName, record: VoiceRecord, by: str, was: str = "") -> AuditEntry:
    return AuditEntry(
        event=event, by=by, id=record.id, name=record.name, was=was, owner=record.owner, consent=record.consent
    )


def _require_changeable(record: VoiceRecord, access: VoiceAccess) -> VoiceRecord:
    if not is_changeable(record, access):
        message = "another key shares this voice; only that key and an admin may change, delete or export it"
        raise JobError("insufficient_permissions", message, param="voice_id")
    return record


def _is_twice(record: VoiceRecord, other: VoiceRecord) -> bool:
    """True if no key could tell the two voices, which have one name, apart by it."""
    return record.owner == other.owner or (record.shared and other.shared)
