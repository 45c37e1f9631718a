"""The threads that see to models' files: one looks at what is there, another brings what is not.

A download takes minutes to hours; neither a look nor any model's move waits for one.
When to look and what to fetch is decided elsewhere (errands.py); what came of it is told through `report`.
"""

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from gpu_worker.engines.base import JobError
from gpu_worker.residency.moves import CheckFiles, Download, Downloaded, FilesChecked
from shared.catalog import ModelSpec

_log = logging.getLogger(__name__)


class Files(Protocol):
    """Who knows where models' files are (see `registry`). Callable from any thread."""

    def problem_of(self, spec: ModelSpec) -> str | None:
        """Why the model cannot be loaded, or None."""
        ...

    def needs_fetch(self, spec: ModelSpec) -> bool:
        """Whether its files have to be fetched first."""
        ...

    def stamp_of(self, spec: ModelSpec) -> str:
        """Something that changes with its files."""
        ...

    def fetch(self, spec: ModelSpec) -> None:
        """Bring its files here; JobError where they cannot be had."""
        ...


class Checkpoints:
    """Looks at and fetches the files of `specs`, each on a daemon thread of its own, one model after the other.

    `report` is called from those threads. The process may end in the middle of a download, which is resumed later.
    """

    def __init__(
        self, specs: Sequence[ModelSpec], files: Files, report: Callable[[FilesChecked | Downloaded], None]
    ) -> None:
        self._specs = {spec.id: spec for spec in specs}
        self._files = files
        self._report = report
        self._looks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._fetches: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, args=(self._looks, self.look), name="look", daemon=True),
            threading.Thread(target=self._run, args=(self._fetches, self._fetch), name="fetch", daemon=True),
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, errand: CheckFiles | Download) -> None:
        """Look or fetch, as soon as those before it have ended."""
        (self._looks if isinstance(errand, CheckFiles) else self._fetches).put(errand.model)

    def close(self, timeout_s: float) -> None:
        """End the threads behind what was submitted, waiting for each for `timeout_s` at most."""
        for models, thread in zip((self._looks, self._fetches), self._threads, strict=True):
            models.put(None)
            thread.join(timeout_s)

    def look(self, model: str) -> FilesChecked:
        """What there is of the model's files now. Reads the disk, for some milliseconds."""
        spec = self._specs[model]
        try:
            problem = self._files.problem_of(spec) or ""
            remote = not problem and self._files.needs_fetch(spec)
            stamp = self._files.stamp_of(spec)
        except Exception as error:  # noqa: BLE001 -- whatever the disk does is this model's problem and no more
            _log.exception("the files of %s cannot be looked at", model)
            return FilesChecked(model=model, problem=f"{type(error).__name__}: {error}", remote=False, stamp="")
        return FilesChecked(model=model, problem=problem, remote=remote, stamp=stamp)

    def _fetch(self, model: str) -> Downloaded:
        try:
            self._files.fetch(self._specs[model])
        except JobError as error:
            _log.warning("fetching %s failed: %s", model, error.message)
            return Downloaded(model=model, error=error)
        except Exception as error:  # noqa: BLE001 -- a library's own surprise is this model's failure and no more
            _log.exception("fetching %s failed", model)
            problem = JobError("model_unavailable", f"fetching {model} failed: {type(error).__name__}: {error}")
            return Downloaded(model=model, error=problem)
        return Downloaded(model=model, error=None)

    def _run(
        self,
        models: "queue.SimpleQueue[str | None]",
        carry_out: Callable[[str], FilesChecked] | Callable[[str], Downloaded],
    ) -> None:
        while (model := models.get()) is not None:
            self._report(carry_out(model))
