"""The files of saved voices and of consents. Only this process writes them.

A voice is two files named by its id: `<id>.safetensors` (the recording) and `<id>.json` (its VoiceRecord).
A consent is the same with a ConsentRecord, in the folder `consents` beside the voices.
The JSON file is written last and deleted first, so a voice is either whole or not there.
No part of a path ever comes from a client.
"""

import contextlib
import os
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
import structlog

from gpu_worker.engines.base import JobError
from shared.pcm import SAMPLE_RATE
from shared.protocol import PortableConsent, PortableVoice, SavedVoice, VoiceConsent

ID_PREFIX: Final = "voice_"
CONSENT_PREFIX: Final = "cons_"
"""How the ids of consents begin; their files have a folder of their own."""

_CONSENTS: Final = "consents"
_TENSOR: Final = "pcm"
_PART: Final = ".part"

log = structlog.get_logger(__name__)


class VoiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file beside a recording; `samples` at 24 kHz, `created_at` in Unix seconds."""

    id: str
    name: str
    kind: Literal["clone", "design"]
    created_at: int
    samples: int
    text: str | None = None
    prompt: str = ""
    description: str = ""
    consent: str = ""
    owner: str = ""
    shared: bool = True

    def to_public(self) -> SavedVoice:
        """The part of the record that clients may see."""
        return SavedVoice(
            id=self.id,
            name=self.name,
            kind=self.kind,
            created_at=self.created_at,
            seconds=self.samples / SAMPLE_RATE,
            in_context=self.text is not None,
            prompt=self.prompt,
            description=self.description,
            owner=self.owner,
            shared=self.shared,
        )


class ConsentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file beside a recorded consent; `samples` at 24 kHz, `created_at` in Unix seconds."""

    id: str
    name: str
    language: str
    created_at: int
    samples: int

    def to_public(self) -> VoiceConsent:
        """The part of the record that clients may see."""
        return VoiceConsent(id=self.id, name=self.name, language=self.language, created_at=self.created_at)


Record = VoiceRecord | ConsentRecord
_R = TypeVar("_R", bound=Record)


class VoiceWrite(msgspec.Struct, frozen=True, kw_only=True):
    """Work for the disk: save `record` with its recording `pcm` (24 kHz mono int16), update, delete or export it.

    `consent` is the one that is exported with a voice.
    """

    kind: Literal["save", "update", "delete", "export"]
    record: Record
    pcm: bytes = b""
    consent: ConsentRecord | None = None

    @property
    def noun(self) -> str:
        """What is written, for messages."""
        return "consent" if isinstance(self.record, ConsentRecord) else "voice"

    @property
    def participle(self) -> str:
        """The state of the voice after a successful write, for messages."""
        return {"save": "saved", "update": "changed", "delete": "deleted", "export": "exported"}[self.kind]


class VoiceWritten(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a write: `error` is None if the disk has taken it. `exported` is the voice that was exported."""

    write: VoiceWrite
    error: JobError | None
    exported: PortableVoice | None = None


class VoiceFiles:
    """Reads and writes the files in `directory`. It keeps nothing in memory: one thread may write while another reads.

    A write syncs the disk, which takes 100 ms and more on a network volume: it never runs on the synthesis thread.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def records(self) -> list[VoiceRecord]:
        """The records of all whole voices, the oldest first. A voice that cannot be read stays on the disk, unlisted.

        Files that a dying process left half-written or half-deleted are removed.
        """
        return _read_all(self._directory, VoiceRecord, ID_PREFIX)

    def consents(self) -> list[ConsentRecord]:
        """The records of all whole consents, as `records` does it."""
        return _read_all(self._directory / _CONSENTS, ConsentRecord, CONSENT_PREFIX)

    def recording(self, voice_id: str) -> bytes:
        """The voice's recording; OSError, KeyError or SafetensorError if it is damaged or gone."""
        samples = safetensors.numpy.load_file(self._recording_path(voice_id))[_TENSOR]
        return samples.astype("<i2").tobytes()

    def write(self, write: VoiceWrite) -> VoiceWritten:
        """Carry out `write`. Every error is part of the report: it fails this voice and nothing else."""
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
        except Exception as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            defect = None if isinstance(error, OSError) else error  # a full disk needs no traceback
            log.error(  # noqa: TRY400 -- as above
                "voice_write_failed", voice=write.record.id, kind=write.kind, reason=reason, exc_info=defect
            )
            message = f"the {write.noun} could not be {write.participle}: {reason}"
            return VoiceWritten(write=write, error=JobError("synthesis_failed", message))
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

        Raises OSError if the disk did not take them, and then leaves no file of the voice.
        """
        recording = safetensors.numpy.save({_TENSOR: np.frombuffer(pcm, dtype="<i2")})
        try:
            self._record_path(record.id).parent.mkdir(parents=True, exist_ok=True)
            _write_file(self._recording_path(record.id), recording)
            _write_file(self._record_path(record.id), msgspec.json.format(msgspec.json.encode(record)))
        except Exception:
            self._remove(record.id)
            raise

    def update(self, record: Record) -> None:
        """Replace the record beside a recording, synced when this returns; OSError if the disk kept the old one."""
        path = self._record_path(record.id)
        path.stat()  # a record without its recording would be unreadable
        _write_file(path, msgspec.json.format(msgspec.json.encode(record)))

    def delete(self, record: Record) -> None:
        """Delete the voice's files, synced when this returns; OSError if the disk kept the record."""
        path = self._record_path(record.id)
        path.unlink(missing_ok=True)
        _sync(path.parent)
        self._remove(record.id)

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


def _read_all(directory: Path, kind: type[_R], prefix: str) -> list[_R]:
    """The whole records in `directory`, the oldest first."""
    records = []
    for path in sorted(directory.glob("*.json")):
        try:
            records.append(_read(path, kind))
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            log.warning("saved_voice_unreadable", voice=path.stem, reason=str(error))
    orphans = [path for path in directory.glob(f"{prefix}*.safetensors") if not path.with_suffix(".json").exists()]
    for path in [*directory.glob(f"*{_PART}"), *orphans]:
        with contextlib.suppress(OSError):
            path.unlink()
    return sorted(records, key=lambda record: record.created_at)


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


def _write_file(path: Path, data: bytes) -> None:
    """Write all of `data` to `path`, synced, or leave `path` as it was."""
    part = _part_of(path)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Sync the names of files in `directory` to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
