"""The book of saved voices: which there are, which are being written, and what they may be called.

Owned by the synthesis thread. It writes nothing itself: it says what is to be written (see `voice_writer`),
and a voice is there, or gone, from when it is told how that went. Only `load` reads the disk (see `voice_files`).
"""

import logging
import secrets
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from typing import Final, Literal

import safetensors

from gpu_worker.engines.base import JobError, Reference
from gpu_worker.voices.checks import check_recording, check_transcript
from gpu_worker.voices.files import ID_PREFIX, VoiceFiles, VoiceRecord
from gpu_worker.voices.writer import VoiceWrite, VoiceWritten
from shared.names import JOINERS, is_printable
from shared.pcm import samples_of
from shared.protocol import SavedVoice

MAX_NAME_CHARS: Final = 64
"""Characters of a voice's name."""

RECENT: Final = 4
"""Recordings kept at hand, of 3 MB at most: reading one from the disk takes 2.5 ms, in which nobody is served."""

MOST_SAVING: Final = 8
"""Recordings that wait for the disk at once, of 3 MB at most: one that hangs must not fill the memory."""

_RETRY_AFTER_S: Final = 5.0

_log = logging.getLogger(__name__)


class VoiceStore:
    """The voices of `files`, at most `max_voices` of them.

    `reserved` are names that mean something else already (preset voices, OpenAI's names).
    `wall` gives Unix seconds.
    """

    def __init__(
        self,
        files: VoiceFiles,
        max_voices: int,
        reserved: Collection[str] = (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._files = files
        self._max_voices = max_voices
        self._reserved = {_folded(name) for name in reserved}
        self._wall = wall
        self._records: dict[str, VoiceRecord] = {}
        self._saving: dict[str, VoiceRecord] = {}
        self._deleting: list[str] = []  # twice where two asked
        self._recent: OrderedDict[str, Reference] = OrderedDict()
        for record in files.records():
            if self.find(record.name) is not None:
                _log.warning("the saved voice %s is left out: another is called %r", record.id, record.name)
                continue
            self._records[record.id] = record

    def __len__(self) -> int:
        return len(self._records)

    @property
    def writing(self) -> bool:
        """Whether anything is being written, or waits to be."""
        return bool(self._saving or self._deleting)

    def list(self) -> list[SavedVoice]:
        """Every voice, the oldest first."""
        return [record.public() for record in self._records.values()]

    def find(self, name: str) -> SavedVoice | None:
        """The voice of that id or name, case aside."""
        record = _called(name, self._records.values())
        return None if record is None else record.public()

    def create(
        self,
        name: str,
        pcm: bytes,
        *,
        kind: Literal["clone", "design"],
        text: str | None = None,
        description: str = "",
        consent: str = "",
    ) -> VoiceWrite:
        """What is to be written to keep `pcm` (24 kHz mono int16 little-endian) as a voice; its name is taken now.

        With `text`, its transcript, it will be cloned in context, else from its speaker embedding alone.
        JobError: as `check_new`, `invalid_audio` or `invalid_value` where no voice can be cloned from the recording
        or nobody can have said `text` in it, `synthesis_failed` where that was designed.
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
        record = VoiceRecord(
            id=f"{ID_PREFIX}{secrets.token_hex(12)}",
            name=name,
            kind=kind,
            created_at=int(self._wall()),
            samples=samples_of(pcm),
            text=text,
            description=description,
            consent=consent,
        )
        self._saving[record.id] = record
        return VoiceWrite(kind="save", record=record, pcm=pcm)

    def check_new(self, name: str) -> str:
        """`name` as it would be kept, before anything is made for it.

        JobError: `invalid_value` where the name will not do or there are too many voices, `queue_full` where
        too many wait for the disk.
        """
        name = unicodedata.normalize("NFC", name).strip()
        count = len(self._records) + len(self._saving)
        if len(name) > MAX_NAME_CHARS or not is_printable(name):
            problem = f"a voice's name has 1 to {MAX_NAME_CHARS} printable characters"
        elif _folded(name) in self._reserved:
            problem = f"{name!r} is the name of a preset voice"
        elif _called(name, [*self._records.values(), *self._saving.values()]) is not None:
            problem = f"there is a saved voice {name!r} already"
        elif count >= self._max_voices:
            problem = f"there are {count} saved voices already and no more may be kept; delete one first"
        elif len(self._saving) >= MOST_SAVING:
            message = f"{len(self._saving)} voices wait for the disk already"
            raise JobError("queue_full", message, retry_after_s=_RETRY_AFTER_S)
        else:
            return name
        raise JobError("invalid_value", problem, param="name")

    def delete(self, voice_id: str) -> VoiceWrite:
        """What is to be written to forget the voice of that id; JobError `voice_not_found`."""
        record = self._record(voice_id)
        self._deleting.append(voice_id)
        return VoiceWrite(kind="delete", record=record)

    def written(self, report: VoiceWritten) -> SavedVoice:
        """Take note of how a write went: the voice that is there now, or gone.

        JobError: the report's, or `voice_not_found` where another had deleted it before.
        """
        record = report.write.record
        if report.write.kind == "save":
            del self._saving[record.id]
            if report.error is not None:
                raise report.error
            self._records[record.id] = record
        else:
            self._deleting.remove(record.id)
            if report.error is not None:
                raise report.error
            self._record(record.id)
            del self._records[record.id]
            self._recent.pop(record.id, None)
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
            pcm = self._files.recording(voice_id)
        except (OSError, KeyError, safetensors.SafetensorError) as error:
            if voice_id in self._deleting:
                raise _not_found(voice_id) from error
            _log.exception("the recording of the voice %s cannot be read", voice_id)
            message = f"the recording of the voice {record.name!r} is damaged; delete it and save it again"
            raise JobError("voice_not_found", message, param="voice") from error
        reference = Reference(key=record.id, pcm=pcm, text=record.text, x_vector_only=record.text is None)
        self._recent[voice_id] = reference
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return reference

    def _record(self, voice_id: str) -> VoiceRecord:
        record = self._records.get(voice_id)
        if record is None:
            raise _not_found(voice_id)
        return record


def _not_found(voice_id: str) -> JobError:
    return JobError("voice_not_found", f"there is no saved voice {voice_id!r}", param="voice")


def _called(name: str, records: Iterable[VoiceRecord]) -> VoiceRecord | None:
    """The one of that id or name, case aside."""
    wanted = _folded(name)
    return next((record for record in records if wanted in (_folded(record.id), _folded(record.name))), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).translate(JOINERS).strip().casefold()
