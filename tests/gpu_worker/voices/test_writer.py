"""The writer carries out one write after the other on its own thread, and tells how each went."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.voices.files import VoiceRecord
from gpu_worker.voices.writer import VoiceWrite, VoiceWriter, VoiceWritten
from tests.gpu_worker.fakes import Reports, SlowVoiceFiles

PCM = b"\1\0" * 100


@pytest.fixture
def files(tmp_path: Path) -> SlowVoiceFiles:
    """A disk that takes its time where it is told to."""
    return SlowVoiceFiles(tmp_path / "voices")


@pytest.fixture
def reports() -> Reports[VoiceWritten]:
    """What the writer told."""
    return Reports()


@pytest.fixture
def writer(files: SlowVoiceFiles, reports: Reports[VoiceWritten]) -> Iterator[VoiceWriter]:
    """A writer that runs."""
    writer = VoiceWriter(files, reports)
    writer.start()
    yield writer
    files.gate.set()
    writer.close(10)


def a_save(name: str) -> VoiceWrite:
    """A voice of that name is to be put on the disk."""
    record = VoiceRecord(id=f"voice_{name}", name=name, kind="clone", created_at=1, samples=len(PCM) // 2)
    return VoiceWrite(kind="save", record=record, pcm=PCM)


def a_delete(save: VoiceWrite) -> VoiceWrite:
    """That voice is to be taken from it."""
    return VoiceWrite(kind="delete", record=save.record)


def test_in_order_and_elsewhere(writer: VoiceWriter, files: SlowVoiceFiles, reports: Reports[VoiceWritten]) -> None:
    """Nobody who submits waits for the disk; what was submitted is done in that order, on the writer's thread."""
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
    ("trouble", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (ValueError("a defect"), "a defect")],
)
def test_fails(
    writer: VoiceWriter, files: SlowVoiceFiles, reports: Reports[VoiceWritten], trouble: Exception, reason: str
) -> None:
    """Whatever goes wrong is told in the words of the disk, and the next write is carried out."""
    ada = a_save("ada")
    files.troubles = [trouble]
    writer.submit(ada)
    writer.submit(ada)
    writer.submit(a_delete(ada))
    error = reports.wait().error
    assert isinstance(error, JobError)
    assert (error.code, error.param) == ("synthesis_failed", None)
    assert error.message.startswith("the voice could not be saved: ")
    assert reason in error.message
    assert [reports.wait().error, reports.wait().error] == [None, None]


def test_close(writer: VoiceWriter, files: SlowVoiceFiles, reports: Reports[VoiceWritten]) -> None:
    """The end waits for what was submitted, but for a disk that hangs no longer than it is told to."""
    files.gate.clear()
    ada = a_save("ada")
    writer.submit(ada)
    writer.close(timeout_s=0.0)
    assert files.records() == []
    files.gate.set()
    writer.close(timeout_s=10)
    assert reports.wait().error is None
    assert files.records() == [ada.record]
