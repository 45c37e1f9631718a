"""Model files: two threads, one checks what is there, the other downloads what is missing.

A download takes minutes to hours; neither a check nor a transition waits for one.
policy.py decides when to check and what to download; results go to `report`.
"""

from collections.abc import Callable, Sequence

import structlog

from gpu_worker.engines.base import JobError
from gpu_worker.engines.factory import EngineFactory
from gpu_worker.residency.models import CheckFiles, Download, Downloaded, FilesChecked
from gpu_worker.serial_thread import SerialThread
from shared.catalog import ModelSpec

log = structlog.get_logger(__name__)


class Checkpoints:
    """Checks and downloads the files of `specs`, which `factory` knows where to find, one model after the other.

    `report` is called on these threads. The process may end during a download; the next one resumes it.
    """

    def __init__(
        self,
        specs: Sequence[ModelSpec],
        factory: EngineFactory,
        report: Callable[[FilesChecked | Downloaded], None],
    ) -> None:
        self._specs = {spec.id: spec for spec in specs}
        self._factory = factory
        self._checks: SerialThread[CheckFiles] = SerialThread(
            "check-files", lambda check: report(self.check(check.model))
        )
        self._downloads: SerialThread[Download] = SerialThread(
            "download", lambda download: report(self._download(download.model))
        )

    def submit(self, work: CheckFiles | Download) -> None:
        """Check or download once what was submitted before has ended."""
        if isinstance(work, CheckFiles):
            self._checks.submit(work)
        else:
            self._downloads.submit(work)

    def close(self, timeout_s: float) -> None:
        """End the threads behind what was submitted, waiting up to `timeout_s` for each."""
        self._checks.close(timeout_s)
        self._downloads.close(timeout_s)

    def check(self, model: str) -> FilesChecked:
        """Check the model's files now, on the calling thread. Reads the disk, for some milliseconds."""
        spec = self._specs[model]
        try:
            problem = self._factory.problem_of(spec) or ""
            remote = not problem and self._factory.needs_download(spec)
            stamp = self._factory.file_stamp(spec)
        except Exception as error:
            log.exception("file_check_failed", model=model)
            return FilesChecked(model=model, problem=f"{type(error).__name__}: {error}", remote=False, stamp="")
        return FilesChecked(model=model, problem=problem, remote=remote, stamp=stamp)

    def _download(self, model: str) -> Downloaded:
        try:
            self._factory.download(self._specs[model])
        except JobError as error:
            log.warning("download_failed", model=model, reason=error.message)
            return Downloaded(model=model, error=error)
        except Exception as error:
            log.exception("download_failed", model=model)
            problem = JobError("model_unavailable", f"downloading {model} failed: {type(error).__name__}: {error}")
            return Downloaded(model=model, error=problem)
        return Downloaded(model=model, error=None)
