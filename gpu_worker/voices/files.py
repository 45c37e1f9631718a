"""The files of saved voices and of consents. The GPU workers of a cluster share the folder.

A voice is two files named by its id: `<id>.safetensors` (the recording) and `<id>.json` (its VoiceRecord).
A consent is the same with a ConsentRecord, in the folder `consents` beside the voices.
The JSON file is written last and deleted first, so a voice is either whole or not there.
One process at a time writes, under the lock of the folder; it looks for the name among the voices of all.
No part of a path ever comes from a client. The audit log has a line of each change, written before it.
"""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
import structlog

from gpu_worker.engines.base import JobError
from gpu_worker.voices.checks import is_name_taken, name_taken
from gpu_worker.voices.records import (
    ConsentRecord,
    FolderScanned,
    Record,
    ScanFolder,
    VoiceRecord,
    VoiceWrite,
    VoiceWritten,
)
from gpu_worker.voices.shared_folder import RecordList, folder_lock
from shared.audit import AuditEntry, AuditError
from shared.protocol import PortableConsent, PortableVoice

ID_PREFIX: Final = "voice_"
CONSENT_PREFIX: Final = "cons_"
"""The ids of consents begin with it; their files have a folder of their own."""

_CONSENTS: Final = "consents"
_TENSOR: Final = "pcm"
_PART: Final = ".part"
_ID: Final = re.compile(rf"({ID_PREFIX}|{CONSENT_PREFIX})\w{{1,64}}", re.ASCII)

log = structlog.get_logger(__name__)


_R = TypeVar("_R", bound=Record)


class VoiceFiles:
    """Reads and writes the files in `directory`. One thread calls `handle`; any thread may read a record or recording.

    A write syncs the disk, which takes 100 ms and more on a network volume: it never runs on the synthesis thread.
    """

    def __init__(self, directory: Path, audit: Callable[[Sequence[AuditEntry]], None] = lambda _entries: None) -> None:
        """`audit` writes the audit log; it raises AuditError if it cannot, and the change is then refused."""
        self._directory = directory
        self._audit = audit
        self._voices = _list_of(directory, VoiceRecord)
        self._consents = _list_of(directory / _CONSENTS, ConsentRecord)
        self._problem = ""

    def records(self) -> list[VoiceRecord]:
        """The records of all whole voices, the oldest first. A voice that cannot be read stays on the disk, unlisted.

        Files that a dying process left half-written or half-deleted are removed. Call it before the thread starts.
        """
        self._remove_leftovers(self._directory, ID_PREFIX)
        return self._scan().voices or []

    def consents(self) -> list[ConsentRecord]:
        """The records of all whole consents, as `records` does it."""
        self._remove_leftovers(self._directory / _CONSENTS, CONSENT_PREFIX)
        return self._scan().consents or []

    def record(self, voice_id: str) -> VoiceRecord | None:
        """The record of the voice with that id, which another process may just have saved; None without one."""
        if not _ID.fullmatch(voice_id):
            return None
        try:
            return _read(self._record_path(voice_id), VoiceRecord)
        except _UNREADABLE:
            return None

    def handle(self, work: "VoiceWrite | ScanFolder") -> "VoiceWritten | FolderScanned":
        """Carry out a write or a scan."""
        return self._scan() if isinstance(work, ScanFolder) else self.write(work)

    def _scan(self) -> FolderScanned:
        try:
            scan = FolderScanned(self._voices.scan(), self._consents.scan())
            self._problem = ""
        except OSError as error:
            if str(error) != self._problem:  # each scan meets it again
                log.warning("voices_folder_unreadable", folder=str(self._directory), reason=str(error))
            self._problem = str(error)
            return FolderScanned(None, None)
        except Exception:  # the next scan may go well, and writes need the thread
            log.exception("voices_folder_scan_failed", folder=str(self._directory))
            return FolderScanned(None, None)
        return scan

    def _remove_leftovers(self, folder: Path, prefix: str) -> None:
        """Remove what no record names. Where another process holds the lock, it may be writing that."""
        with contextlib.suppress(OSError), folder_lock(self._directory, wait=False):
            orphans = [path for path in folder.glob(f"{prefix}*.safetensors") if not path.with_suffix(".json").exists()]
            for path in [*folder.glob(f"*{_PART}"), *orphans]:
                with contextlib.suppress(OSError):
                    path.unlink()

    def recording(self, voice_id: str) -> bytes:
        """The voice's recording; OSError, KeyError or SafetensorError if it is damaged or gone."""
        samples = safetensors.numpy.load_file(self._recording_path(voice_id))[_TENSOR]
        return samples.astype("<i2").tobytes()

    def write(self, write: VoiceWrite) -> VoiceWritten:
        """Carry out `write`. Every error is part of the report: it fails this voice and nothing else."""
        try:
            self._audit(write.audit)
        except AuditError as error:
            log.error("audit_log_not_written", voice=write.record.id, kind=write.kind, reason=str(error))  # noqa: TRY400 -- no traceback helps
            message = f"the {write.noun} could not be {write.participle}: the audit log cannot be written ({error})"
            return VoiceWritten(write=write, error=JobError("internal_error", message))
        written = self._carry_out(write)
        if written.error is not None:
            failed = [msgspec.structs.replace(entry, failed=written.error.message) for entry in write.audit]
            try:
                self._audit(failed)
            except AuditError as error:
                log.error("audit_log_not_written", voice=write.record.id, kind="failure", reason=str(error))  # noqa: TRY400 -- as above
        return written

    def _carry_out(self, write: VoiceWrite) -> VoiceWritten:
        exported = None
        try:
            if write.kind == "export" and isinstance(write.record, VoiceRecord):
                exported = self.export(write.record, write.consent)
            elif write.kind == "save":
                self.save(write.record, write.pcm)
            elif write.kind == "update":
                self.update(write.record)
            else:
                self.delete(write.record)
        except JobError as error:
            return VoiceWritten(write=write, error=error)
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            defect = None if isinstance(error, OSError) else error  # a full disk needs no traceback
            log.error(  # noqa: TRY400 -- as above
                "voice_write_failed", voice=write.record.id, kind=write.kind, reason=reason, exc_info=defect
            )
            message = f"the {write.noun} could not be {write.participle}: {reason}"
            return VoiceWritten(write=write, error=JobError("internal_error", message))
        return VoiceWritten(write=write, error=None, exported=exported)

    def export(self, record: VoiceRecord, consent: ConsentRecord | None) -> PortableVoice:
        """The voice with its recording, and its consent; OSError, KeyError or SafetensorError if one is damaged."""
        portable = None
        if consent is not None:
            portable = PortableConsent(
                name=consent.name,
                language=consent.language,
                created_at=consent.created_at,
                pcm=self.recording(consent.id),
            )
        return PortableVoice(
            name=record.name,
            kind=record.kind,
            text=record.text,
            prompt=record.prompt,
            description=record.description,
            pcm=self.recording(record.id),
            consent=portable,
        )

    def save(self, record: Record, pcm: bytes) -> None:
        """Write `pcm` (24 kHz mono int16 little-endian) and its record; both are synced when this returns.

        Raises OSError if the disk did not take them, JobError if another voice has the name; no file is left then.
        """
        recording = safetensors.numpy.save({_TENSOR: np.frombuffer(pcm, dtype="<i2")})
        self._record_path(record.id).parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(self._directory):
            try:
                _write_file(self._recording_path(record.id), recording)
                self._write_record(record)
            except Exception:
                self._remove(record.id)
                raise

    def update(self, record: Record) -> None:
        """Replace the record beside a recording, synced when this returns; OSError if the disk kept the old one.

        Raises JobError if another process has deleted the voice, or has given its new name to another one.
        """
        with folder_lock(self._directory):
            if not self._record_path(record.id).exists():
                raise not_found(record)
            self._write_record(record)

    def delete(self, record: Record) -> None:
        """Delete the voice's files, synced when this returns; OSError if the disk kept the record.

        Raises JobError if another process has deleted them.
        """
        path = self._record_path(record.id)
        with folder_lock(self._directory):
            if not path.exists():
                raise not_found(record)
            path.unlink()
            _sync(path.parent)
            self._remove(record.id)

    def _write_record(self, record: Record) -> None:
        """Write the record unless another voice has its name. Holds the lock."""
        data = msgspec.json.format(msgspec.json.encode(record))
        # A network volume shows the changes of others as soon as this client has changed the folder: so not before.
        _write_file(self._record_path(record.id), data, check=lambda: self._check_name(record))

    def _check_name(self, record: Record) -> None:
        if isinstance(record, ConsentRecord):
            return
        if is_name_taken(record.name, record.owner, self._voices.scan(), but=record.id):
            raise name_taken(record.name)

    def _remove(self, voice_id: str) -> None:
        """Remove all files of a voice, as far as the disk allows; `records` handles the rest at the next start."""
        for path in (self._record_path(voice_id), self._recording_path(voice_id)):
            for found in (path, _part_of(path)):
                with contextlib.suppress(OSError):
                    found.unlink()

    def _recording_path(self, voice_id: str) -> Path:
        return self._record_path(voice_id).with_suffix(".safetensors")

    def _record_path(self, voice_id: str) -> Path:
        folder = self._directory / _CONSENTS if voice_id.startswith(CONSENT_PREFIX) else self._directory
        return folder / f"{voice_id}.json"


def not_found(record: Record) -> JobError:
    """The error of a change of a voice or consent that is gone."""
    if isinstance(record, ConsentRecord):
        return JobError("consent_not_found", f"there is no consent {record.id!r}", param="consent")
    return JobError("voice_not_found", f"there is no saved voice {record.id!r}", param="voice")


_UNREADABLE: Final = (OSError, ValueError, RecursionError, safetensors.SafetensorError)


def _list_of(folder: Path, kind: type[_R]) -> RecordList[_R]:
    return RecordList(
        folder,
        lambda path: _read(path, kind),
        order=lambda record: (record.created_at, record.id),
        unreadable=_UNREADABLE,
    )


def _read(path: Path, kind: type[_R]) -> _R:
    """The record in `path`; ValueError if it does not fit its recording, of which only the header is read."""
    record = msgspec.json.decode(path.read_bytes(), type=kind)
    if record.id != path.stem:
        raise ValueError(f"the record names another voice: {record.id!r}")
    with safetensors.safe_open(path.with_suffix(".safetensors"), framework="numpy") as file:
        if list(file.keys()) != [_TENSOR]:
            raise ValueError(f"the recording's file holds {list(file.keys())}")
        recording = file.get_slice(_TENSOR)
        if recording.get_dtype() != "I16" or recording.get_shape() != [record.samples]:
            raise ValueError(f"the recording is {recording.get_dtype()} {recording.get_shape()}")
    return record


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _write_file(path: Path, data: bytes, check: Callable[[], None] = lambda: None) -> None:
    """Write all of `data` to `path`, synced, or leave `path` as it was. `check` runs last, and may refuse it."""
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check()
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Sync the names of files in `directory` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
