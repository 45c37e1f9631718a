"""Checks and downloads run on two threads, and neither waits for the other."""

from collections.abc import Iterator

import pytest

from gpu_worker.engines.base import JobError
from gpu_worker.residency.checkpoints import Checkpoints
from gpu_worker.residency.models import CheckFiles, Download, Downloaded, FilesChecked
from tests.gpu_worker.fakes import FakeFiles, Reports, a_spec


class Bench:
    """Checkpoints over files that can be held up."""

    def __init__(self) -> None:
        self.files = FakeFiles()
        self.reports: Reports[FilesChecked | Downloaded] = Reports()
        self.checkpoints = Checkpoints([a_spec("a"), a_spec("b")], self.files, self.reports)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench whose threads end with the test."""
    bench = Bench()
    yield bench
    bench.files.gate.set()
    bench.checkpoints.close(10)


def test_check(bench: Bench) -> None:
    """A check reports what is missing, whether a download is needed, and the files' stamp."""
    bench.files.problems["a"] = "there are no weights"
    bench.files.remote = {"a", "b"}
    bench.files.stamps["b"] = "new"
    for model in "ab":
        bench.checkpoints.submit(CheckFiles(model))
    assert bench.reports.wait() == FilesChecked(
        model="a", problem="there are no weights", remote=False, stamp="unchanged"
    )
    assert bench.reports.wait() == FilesChecked(model="b", problem="", remote=True, stamp="new")
    assert bench.files.threads == {"problem_of": {"check-files"}}


def test_a_check_does_not_wait_for_a_download(bench: Bench) -> None:
    """Checks go on during a download; a second download waits for the first."""
    bench.files.remote = {"a", "b"}
    bench.files.gate.clear()
    bench.checkpoints.submit(Download("a"))
    bench.checkpoints.submit(Download("b"))
    bench.checkpoints.submit(CheckFiles("b"))
    assert isinstance(bench.reports.wait(), FilesChecked)
    assert bench.files.remote == {"a", "b"}
    bench.files.gate.set()
    assert bench.reports.wait() == Downloaded(model="a", error=None)
    assert bench.reports.wait() == Downloaded(model="b", error=None)
    assert bench.files.remote == set()
    assert bench.files.threads["download"] == {"download"}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        (JobError("model_unavailable", "the hub is out of reach"), "the hub is out of reach"),
        (KeyError("siblings"), "downloading a failed: KeyError: 'siblings'"),
    ],
)
def test_failed_download(bench: Bench, trouble: Exception, message: str) -> None:
    """A failed download reports why, whatever was raised, and can be repeated."""
    bench.files.download_errors["a"] = [trouble]
    bench.checkpoints.submit(Download("a"))
    report = bench.reports.wait()
    assert isinstance(report, Downloaded)
    assert report.error is not None
    assert (report.error.code, report.error.message) == ("model_unavailable", message)
    bench.checkpoints.submit(Download("a"))
    assert bench.reports.wait() == Downloaded(model="a", error=None)


def test_failed_check(bench: Bench) -> None:
    """A check that raises is reported as the model's problem; the next check runs."""

    def broken(_: object) -> str:
        raise PermissionError(13, "Permission denied")

    bench.files.file_stamp = broken  # type: ignore[method-assign] # the one thing that differs
    bench.checkpoints.submit(CheckFiles("a"))
    report = bench.reports.wait()
    assert isinstance(report, FilesChecked)
    assert "Permission denied" in report.problem
    bench.files.problems["b"] = "gone"
    bench.checkpoints.submit(CheckFiles("b"))
    assert isinstance(bench.reports.wait(), FilesChecked)
