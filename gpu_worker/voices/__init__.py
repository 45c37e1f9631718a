"""Saved voices on the worker's disk, and the checks of every recording that a voice is cloned from.

The store keeps the list, the files do the I/O, and a thread of the caller writes.
"""

from gpu_worker.voices.checks import check_recording, check_transcript
from gpu_worker.voices.files import VoiceFiles, VoiceRecord, VoiceWrite, VoiceWritten
from gpu_worker.voices.store import VoiceStore

__all__ = [
    "VoiceFiles",
    "VoiceRecord",
    "VoiceStore",
    "VoiceWrite",
    "VoiceWritten",
    "check_recording",
    "check_transcript",
]
