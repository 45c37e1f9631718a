"""VoiceFiles carries out writes on a SerialThread and reports how each went."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from gpu_worker.engines.base import JobError
from gpu_worker.serial_thread import SerialThread
from gpu_worker.voices import FolderScanned, ScanFolder, VoiceRecord, VoiceWrite, VoiceWritten
from tests.gpu_worker.fakes import Reports, SlowVoiceFiles

PCM = b"\1\0" * 100


@pytest.fixture
def files(tmp_path: Path) -> SlowVoiceFiles:
    """A real folder on a disk that a test can hold up."""
    return SlowVoiceFiles(tmp_path / "voices")


@pytest.fixture
def reports() -> Reports[VoiceWritten]:
    """The reports of finished writes."""
    return Reports()


@pytest.fixture
def writer(files: SlowVoiceFiles, reports: Reports[VoiceWritten]) -> Iterator[SerialThread[VoiceWrite]]:
    """The thread that writes, wired as in the process."""
    writer = SerialThread[VoiceWrite]("voices", lambda write: reports(files.write(write)))
    yield writer
    files.gate.set()
    writer.close(10)


def a_save(name: str) -> VoiceWrite:
    """A write that saves a voice of that name."""
    record = VoiceRecord(id=f"voice_{name}", name=name, kind="clone", created_at=1, samples=len(PCM) // 2)
    return VoiceWrite(kind="save", record=record, pcm=PCM)


def a_delete(save: VoiceWrite) -> VoiceWrite:
    """A write that deletes the voice of `save`."""
    return VoiceWrite(kind="delete", record=save.record)


def test_writes_in_order_on_the_thread(
    writer: SerialThread[VoiceWrite], files: SlowVoiceFiles, reports: Reports[VoiceWritten]
) -> None:
    """Submitting does not wait for the disk; writes are carried out in order, on the thread."""
    files.gate.clear()
    ada, bob = a_save("ada"), a_save("bob")
    writes = [ada, bob, a_delete(ada)]
    for write in writes:
        writer.submit(write)
    assert files.records() == []
    files.gate.set()
    for write in writes:
        report = reports.wait()
        assert report.write is write
        assert report.error is None
    assert files.records() == [bob.record]
    assert files.recording(bob.record.id) == PCM
    assert files.threads == {"voices"}


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (ValueError("a defect"), "a defect")],
)
def test_an_error_is_reported(
    writer: SerialThread[VoiceWrite],
    files: SlowVoiceFiles,
    reports: Reports[VoiceWritten],
    error: Exception,
    reason: str,
) -> None:
    """An error fails its own write, with the disk's message; the next writes are carried out."""
    ada = a_save("ada")
    files.errors = [error]
    with structlog.testing.capture_logs() as logged:
        writer.submit(ada)
        raised = reports.wait().error
    writer.submit(ada)
    writer.submit(a_delete(ada))
    assert isinstance(raised, JobError)
    assert (raised.code, raised.param) == ("internal_error", None)
    assert raised.message.startswith("the voice could not be saved: ")
    assert reason in raised.message
    assert reason in logged[0]["reason"]
    assert (logged[0]["exc_info"] is None) == isinstance(error, OSError)
    assert [reports.wait().error, reports.wait().error] == [None, None]


def test_a_scan_that_fails(files: SlowVoiceFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that nobody expected leaves the lists as they are, and the thread alive."""
    monkeypatch.setattr(files._voices, "scan", lambda: 1 // 0)
    with structlog.testing.capture_logs() as lines:
        assert files.handle(ScanFolder()) == FolderScanned(None, None)
    assert [line["event"] for line in lines] == ["voices_folder_scan_failed"]
