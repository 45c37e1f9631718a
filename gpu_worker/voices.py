"""Saved voices on disk: recordings that speech can be cloned from. This process is their only owner.

A voice is two files named by its id: `<id>.safetensors` (the recording) and `<id>.json` (all that is said of it).
The JSON is written last and deleted first, so a voice is whole or not there.
No part of a path ever comes from a client.
"""

import contextlib
import logging
import os
import secrets
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import safetensors
import safetensors.numpy

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.recordings import check_recording, check_transcript
from shared.names import JOINERS, is_printable
from shared.pcm import SAMPLE_RATE, samples_of
from shared.protocol import SavedVoice

MAX_NAME_CHARS: Final = 64
"""Characters of a voice's name."""

RECENT: Final = 4
"""Recordings kept at hand, of 3 MB at most: reading one from the disk takes 2.5 ms, in which nobody is served."""

_ID: Final = "voice_"
_TENSOR: Final = "pcm"
_PART: Final = ".part"

_log = logging.getLogger(__name__)


class _Record(msgspec.Struct, frozen=True, kw_only=True):
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
        return SavedVoice(
            id=self.id,
            name=self.name,
            kind=self.kind,
            created_at=self.created_at,
            seconds=self.samples / SAMPLE_RATE,
            in_context=self.text is not None,
            description=self.description,
        )


class VoiceStore:
    """The voices in `directory`, at most `max_voices` of them; for one thread.

    `reserved` are names that mean something else already (preset voices, OpenAI's names).
    A voice that cannot be read is left where it is, logged and not listed.
    `wall` gives Unix seconds.
    """

    def __init__(
        self,
        directory: Path,
        max_voices: int,
        reserved: Collection[str] = (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._max_voices = max_voices
        self._reserved = {_folded(name) for name in reserved}
        self._wall = wall
        self._records: dict[str, _Record] = {}
        self._recent: OrderedDict[str, Reference] = OrderedDict()
        self._read_all()

    def __len__(self) -> int:
        return len(self._records)

    def list(self) -> list[SavedVoice]:
        """Every voice, the oldest first."""
        return [record.public() for record in self._records.values()]

    def find(self, name: str) -> SavedVoice | None:
        """The voice of that id or name, case aside."""
        wanted = _folded(name)
        for record in self._records.values():
            if wanted in (_folded(record.id), _folded(record.name)):
                return record.public()
        return None

    def create(
        self,
        name: str,
        pcm: bytes,
        *,
        kind: Literal["clone", "design"],
        text: str | None = None,
        description: str = "",
        consent: str = "",
    ) -> SavedVoice:
        """Keep `pcm` (24 kHz mono int16 little-endian) as a voice; it is on the disk when this returns.

        With `text`, its transcript, it will be cloned in context, else from its speaker embedding alone.
        JobError: `invalid_value` where the name will not do or there are too many voices,
        `invalid_audio` where no voice can be cloned from the recording, `synthesis_failed` where the disk
        did not take it, or what was designed will not do.
        """
        name = self.check_new(name)
        try:
            check_recording(pcm, "audio_sample")
            check_transcript(text or "", pcm)
        except JobError as error:
            if kind == "clone":
                raise
            message = f"the model made no voice of this description ({error.message}); try again"
            raise JobError("synthesis_failed", message) from error
        voice_id = f"{_ID}{secrets.token_hex(12)}"
        record = _Record(
            id=voice_id,
            name=name,
            kind=kind,
            created_at=int(self._wall()),
            samples=samples_of(pcm),
            text=text,
            description=description,
            consent=consent,
        )
        recording = safetensors.numpy.save({_TENSOR: np.frombuffer(pcm, dtype="<i2")})
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _write(self._recording(voice_id), recording)
            _write(self._description(voice_id), msgspec.json.format(msgspec.json.encode(record)))
        except OSError as error:
            _log.exception("the voice %s could not be written", voice_id)
            self._remove(voice_id)
            raise JobError("synthesis_failed", f"the voice could not be saved: {error.strerror}") from error
        self._records[voice_id] = record
        return record.public()

    def check_new(self, name: str) -> str:
        """`name` as it would be kept, before anything is made for it; JobError `invalid_value` says why not."""
        name = unicodedata.normalize("NFC", name).strip()
        if len(name) > MAX_NAME_CHARS or not is_printable(name):
            problem = f"a voice's name has 1 to {MAX_NAME_CHARS} printable characters"
        elif _folded(name) in self._reserved:
            problem = f"{name!r} is the name of a preset voice"
        elif self.find(name) is not None:
            problem = f"there is a saved voice {name!r} already"
        elif len(self._records) >= self._max_voices:
            problem = f"there are {len(self._records)} saved voices already and no more may be kept; delete one first"
        else:
            return name
        raise JobError("invalid_value", problem, param="name")

    def delete(self, voice_id: str) -> SavedVoice:
        """Forget the voice of that id, and say what it was.

        JobError: `voice_not_found`, `synthesis_failed` where the disk kept it.
        """
        record = self._record(voice_id)
        try:
            self._description(voice_id).unlink(missing_ok=True)
            _sync(self._directory)
        except OSError as error:
            _log.exception("the voice %s could not be deleted", voice_id)
            raise JobError("synthesis_failed", f"the voice could not be deleted: {error.strerror}") from error
        del self._records[voice_id]
        self._recent.pop(voice_id, None)
        self._remove(voice_id)
        return record.public()

    def load(self, voice_id: str) -> Reference:
        """The recording of the voice of that id, ready to be cloned; JobError `voice_not_found`.

        Also where it has been damaged since: `voice_not_found`, and the log says what is wrong.
        Ids are never used twice, so the reference's `key` is the id.
        """
        record = self._record(voice_id)
        if voice_id in self._recent:
            self._recent.move_to_end(voice_id)
            return self._recent[voice_id]
        try:
            pcm = safetensors.numpy.load_file(self._recording(voice_id))[_TENSOR].astype("<i2").tobytes()
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            _log.exception("the recording of the voice %s cannot be read", voice_id)
            message = f"the recording of the voice {record.name!r} is damaged; delete it and save it again"
            raise JobError("voice_not_found", message, param="voice") from error
        reference = Reference(key=record.id, pcm=pcm, text=record.text, x_vector_only=record.text is None)
        self._recent[voice_id] = reference
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return reference

    def _record(self, voice_id: str) -> _Record:
        record = self._records.get(voice_id)
        if record is None:
            raise JobError("voice_not_found", f"there is no saved voice {voice_id!r}", param="voice")
        return record

    def _read_all(self) -> None:
        records = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                records.append(self._read(path))
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                _log.warning("the saved voice %s is left out: %s", path.stem, error)
        orphans = [
            path for path in self._directory.glob(f"{_ID}*.safetensors") if not path.with_suffix(".json").exists()
        ]
        for path in [*self._directory.glob(f"*{_PART}"), *orphans]:
            # What a process that died was writing, and nobody was told of, or was deleting.
            with contextlib.suppress(OSError):
                path.unlink()
        records.sort(key=lambda record: record.created_at)
        for record in records:
            if self.find(record.name) is not None:
                _log.warning("the saved voice %s is left out: another is called %r", record.id, record.name)
                continue
            self._records[record.id] = record

    def _read(self, path: Path) -> _Record:
        """The record in `path`, its recording looked at but not read; ValueError where they do not fit."""
        record = msgspec.json.decode(path.read_bytes(), type=_Record)
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


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).translate(JOINERS).strip().casefold()


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
