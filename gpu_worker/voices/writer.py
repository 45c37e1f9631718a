"""The thread that writes saved voices: a sync takes 100 ms and more on a network volume, and no stream waits for it.

Which voices there are is decided elsewhere (voices.py); how a write went is told through `report`.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Literal

import msgspec

from gpu_worker.engines.base import JobError
from gpu_worker.voices.files import VoiceFiles, VoiceRecord

_log = logging.getLogger(__name__)


class VoiceWrite(msgspec.Struct, frozen=True, kw_only=True):
    """One voice is to be put on the disk, `pcm` being its recording (24 kHz mono int16), or taken from it."""

    kind: Literal["save", "delete"]
    record: VoiceRecord
    pcm: bytes = b""

    @property
    def done(self) -> str:
        """What the voice is when it has worked, in words."""
        return "saved" if self.kind == "save" else "deleted"


class VoiceWritten(msgspec.Struct, frozen=True, kw_only=True):
    """A write has ended: it is on the disk, or `error` says why not."""

    write: VoiceWrite
    error: JobError | None


class VoiceWriter:
    """Carries out one write after the other, in the order of their coming, on a daemon thread of its own.

    `report` is called from that thread.
    """

    def __init__(self, files: VoiceFiles, report: Callable[[VoiceWritten], None]) -> None:
        self._files = files
        self._report = report
        self._writes: queue.SimpleQueue[VoiceWrite | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="voices", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, write: VoiceWrite) -> None:
        """Carry out `write` as soon as those before it have ended."""
        self._writes.put(write)

    def close(self, timeout_s: float | None = None) -> None:
        """Carry out and report what was submitted and end the thread, waiting for `timeout_s` at most."""
        self._writes.put(None)
        self._thread.join(timeout_s)

    def carry_out(self, write: VoiceWrite) -> VoiceWritten:
        """Do it now, and say how it went."""
        try:
            if write.kind == "save":
                self._files.save(write.record, write.pcm)
            else:
                self._files.delete(write.record)
        except Exception as error:  # noqa: BLE001 -- whatever the disk does is this voice's failure and no more
            _log.exception("the voice %s could not be %s", write.record.id, write.done)
            reason = (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"
            message = f"the voice could not be {write.done}: {reason}"
            return VoiceWritten(write=write, error=JobError("synthesis_failed", message))
        return VoiceWritten(write=write, error=None)

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            self._report(self.carry_out(write))
