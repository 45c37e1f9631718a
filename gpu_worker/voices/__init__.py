"""Saved voices and consents on the worker's disk, and the checks of every recording that a voice is cloned from.

The store keeps the list, the files do the I/O, and a thread of the caller writes.
Several GPU workers may share the folder: `FolderWatch` decides when to scan for the changes of the others.
"""

from gpu_worker.voices.checks import OutdatedError as OutdatedError
from gpu_worker.voices.checks import check_recording as check_recording
from gpu_worker.voices.checks import check_transcript as check_transcript
from gpu_worker.voices.consents import ConsentStore as ConsentStore
from gpu_worker.voices.files import VoiceFiles as VoiceFiles
from gpu_worker.voices.folder_watch import FolderWatch as FolderWatch
from gpu_worker.voices.records import ConsentRecord as ConsentRecord
from gpu_worker.voices.records import FolderScanned as FolderScanned
from gpu_worker.voices.records import ScanFolder as ScanFolder
from gpu_worker.voices.records import VoiceRecord as VoiceRecord
from gpu_worker.voices.records import VoiceWrite as VoiceWrite
from gpu_worker.voices.records import VoiceWritten as VoiceWritten
from gpu_worker.voices.store import VoiceStore as VoiceStore
