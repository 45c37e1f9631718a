"""The record beside the recording of a voice or a consent, and the jobs and reports of the thread that writes both."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from gpu_worker.engines.base import JobError
from shared.audit import AuditEntry
from shared.pcm import SAMPLE_RATE
from shared.protocol import PortableVoice, SavedVoice, VoiceConsent

UnixTime = Annotated[int, Meta(ge=0, le=2**53)]
"""Seconds. A record is a file that people can edit, and a number in a message has 64 bits."""


class VoiceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file beside a recording; `samples` at 24 kHz, `created_at` in Unix seconds."""

    id: str
    name: str
    kind: Literal["clone", "design"]
    created_at: UnixTime
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
    created_at: UnixTime
    samples: int
    owner: str = ""

    @property
    def shared(self) -> bool:
        """True if every key may use it: no key owns it."""
        return not self.owner

    def to_public(self) -> VoiceConsent:
        """The part of the record that clients may see."""
        return VoiceConsent(id=self.id, name=self.name, language=self.language, created_at=self.created_at)


Record = VoiceRecord | ConsentRecord


class VoiceWrite(msgspec.Struct, frozen=True, kw_only=True):
    """Work for the disk: save `record` with its recording `pcm` (24 kHz mono int16), update, delete or export it.

    `consent` is the one that is exported with a voice. `audit` is what the audit log says of it, before it is done.
    """

    kind: Literal["save", "update", "delete", "export"]
    record: Record
    pcm: bytes = b""
    consent: ConsentRecord | None = None
    audit: tuple[AuditEntry, ...] = ()

    @property
    def noun(self) -> str:
        """The noun for the record in messages."""
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


class ScanFolder(msgspec.Struct, frozen=True):
    """Work for the disk: find out what other processes have changed. FolderScanned is its report."""


class FolderScanned(msgspec.Struct, frozen=True):
    """All voices and all consents, the oldest first; None if the folder could not be read."""

    voices: list[VoiceRecord] | None
    consents: list[ConsentRecord] | None
