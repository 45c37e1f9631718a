"""Saved voices on the disk. This process is their only owner.

A voice is two files named by its id: `<id>.safetensors` (the recording) and `<id>.json` (all that is said of it).
The JSON is written last and deleted first, so a voice is whole or not there.
No part of a path ever comes from a client.
"""

import contextlib
import logging
import os
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from shared.pcm import SAMPLE_RATE
from shared.protocol import SavedVoice

ID_PREFIX: Final = "voice_"

_TENSOR: Final = "pcm"
_PART: Final = ".part"

_log = logging.getLogger(__name__)


class VoiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON beside a recording; `samples` at 24 kHz, `created_at` in Unix seconds."""

    id: str
    name: str
    kind: Literal["clone", "design"]
    created_at: int
    samples: int
    text: str | None = None
    description: str = ""
    consent: str = ""

    def public(self) -> SavedVoice:
        """What everybody may know of it."""
        return SavedVoice(
            id=self.id,
            name=self.name,
            kind=self.kind,
            created_at=self.created_at,
            seconds=self.samples / SAMPLE_RATE,
            in_context=self.text is not None,
            description=self.description,
        )


class VoiceFiles:
    """The files in `directory`. Nothing is kept in memory: one thread may write while another reads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def records(self) -> list[VoiceRecord]:
        """Every voice that is whole, the oldest first; what a process that died left behind is taken away.

        A voice that cannot be read is left where it is and logged.
        """
        records = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                records.append(self._read(path))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                _log.warning("the saved voice %s is left out: %s", path.stem, error)
        orphans = [
            path for path in self._directory.glob(f"{ID_PREFIX}*.safetensors") if not path.with_suffix(".json").exists()
        ]
        for path in [*self._directory.glob(f"*{_PART}"), *orphans]:
            # What a process that died was writing, and nobody was told of, or was deleting.
            with contextlib.suppress(OSError):
                path.unlink()
        return sorted(records, key=lambda record: record.created_at)

    def recording(self, voice_id: str) -> bytes:
        """The voice's recording; OSError, KeyError or SafetensorError where it is damaged or gone."""
        samples = safetensors.numpy.load_file(self._recording(voice_id))[_TENSOR]
        return samples.astype("<i2").tobytes()

    def save(self, record: VoiceRecord, pcm: bytes) -> None:
        """Keep `pcm` (24 kHz mono int16 little-endian) as that voice; it is on the disk when this returns.

        Raises OSError where the disk did not take it, and then leaves nothing of it.
        """
        recording = safetensors.numpy.save({_TENSOR: np.frombuffer(pcm, dtype="<i2")})
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _write(self._recording(record.id), recording)
            _write(self._description(record.id), msgspec.json.format(msgspec.json.encode(record)))
        except Exception:
            self._remove(record.id)
            raise

    def delete(self, record: VoiceRecord) -> None:
        """Have that voice gone from the disk when this returns; OSError where the disk kept it."""
        self._description(record.id).unlink(missing_ok=True)
        _sync(self._directory)
        self._remove(record.id)

    def _read(self, path: Path) -> VoiceRecord:
        """The record in `path`, its recording looked at but not read; ValueError where they do not fit."""
        record = msgspec.json.decode(path.read_bytes(), type=VoiceRecord)
        if record.id != path.stem:
            raise ValueError(f"it says that it is {record.id!r}")
        with safetensors.safe_open(self._recording(record.id), framework="numpy") as file:
            if list(file.keys()) != [_TENSOR]:
                raise ValueError(f"its recording holds {list(file.keys())}")
            recording = file.get_slice(_TENSOR)
            if recording.get_dtype() != "I16" or recording.get_shape() != [record.samples]:
                raise ValueError(f"its recording is {recording.get_dtype()} {recording.get_shape()}")
        return record

    def _remove(self, voice_id: str) -> None:
        """Take away what there is of a voice's files; what cannot be, the next start leaves out or takes away."""
        for path in (self._description(voice_id), self._recording(voice_id)):
            for found in (path, _part_of(path)):
                with contextlib.suppress(OSError):
                    found.unlink()

    def _recording(self, voice_id: str) -> Path:
        return self._directory / f"{voice_id}.safetensors"

    def _description(self, voice_id: str) -> Path:
        return self._directory / f"{voice_id}.json"


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _write(path: Path, data: bytes) -> None:
    """Put `data` into `path`: all of it, on the disk, or nothing."""
    part = _part_of(path)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """Have a change of names in `directory` on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
