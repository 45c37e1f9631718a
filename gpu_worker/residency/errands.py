"""What is to be done with models' files: when to look at them, which to fetch, and what is known of them.

It touches no file itself (see fetcher.py), moves no model and refuses none (see residency.py).
Owned by the synthesis thread alone; its time is a clock that is passed in.
"""

from collections.abc import Callable
from typing import Final

from gpu_worker.residency.ledger import ModelTable
from gpu_worker.residency.moves import CheckFiles, Download, Downloaded, FilesChecked

LOOK_S: Final = 5.0
"""How often the files of models that are not loaded are looked at: weights are copied in and deleted by hand."""


class _Files:
    """What is known of one model's files.

    `current`: they were looked at since that was last asked for.
    `problem` says why the model cannot be loaded, or is empty; `remote`: its files have to be fetched before it can.
    `stamp` is theirs, as last seen.
    """

    def __init__(self) -> None:
        self.looking = False
        self.current = False
        self.fetching = False
        self.problem = ""
        self.remote = False
        self.stamp: str | None = None


class Errands:
    """The errands for the models of `ledger`, beside whatever moves: before every load, and now and then.

    The synthesis loop hands what is `due` to the fetcher, and tells the outcome with `looked` or `Residency.fetched`.
    """

    def __init__(self, ledger: ModelTable, clock: Callable[[], float]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._files = {account.id: _Files() for account in ledger}
        self._next_look = clock() + LOOK_S

    def due(self) -> list[CheckFiles | Download]:
        """What is to be done now; in flight from here on, one fetch at a time."""
        overdue = self._clock() >= self._next_look
        if overdue:
            self._next_look = self._clock() + LOOK_S
        errands: list[CheckFiles | Download] = []
        for account in self._ledger:
            files = self._files[account.id]
            wanted = account.wanted and not files.current
            idle = not (files.looking or files.fetching or self._ledger.is_moving(account))
            if account.place == "absent" and idle and (overdue or wanted):
                files.looking = True
                errands.append(CheckFiles(account.id))
        if not any(files.fetching for files in self._files.values()):
            for account in self._ledger.waiting():
                files = self._files[account.id]
                if account.place == "absent" and files.current and files.remote:
                    files.fetching = True
                    errands.append(Download(account.id))
                    break
        return errands

    def looked(self, found: FilesChecked) -> None:
        """What there is of the model's files."""
        files = self._files[found.model]
        files.looking = False
        files.current = True
        files.problem = found.problem
        files.remote = found.remote
        account = self._ledger[found.model]
        if files.stamp not in {None, found.stamp} and account.trouble_looked_at is None:
            account.trouble = ""  # it was with other files
        files.stamp = found.stamp

    def fetched(self, fetched: Downloaded) -> None:
        """The model's files are here, or cannot be had."""
        files = self._files[fetched.model]
        files.fetching = False
        self._ledger[fetched.model].progress = ""
        if fetched.error is None:
            files.remote = False
        else:
            files.stamp = None  # what was fetched in part has changed it, and mends nothing

    def look_again(self, model: str) -> None:
        """What was seen counts no longer: the files are to be looked at before the model's next load."""
        self._files[model].current = False

    def problem(self, model: str) -> str:
        """Why the model cannot be loaded, as far as its files go; or empty."""
        return self._files[model].problem

    def is_fetching(self, model: str) -> bool:
        """Whether the model's files are being fetched."""
        return self._files[model].fetching

    def is_in_the_way(self, model: str) -> bool:
        """Whether a load has to wait for an errand."""
        files = self._files[model]
        return not files.current or files.fetching or (files.remote and not files.problem)
