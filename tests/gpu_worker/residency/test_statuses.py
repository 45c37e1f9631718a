"""The status of a model as clients see it, with plain data."""

from typing import Any

import pytest

from gpu_worker.residency.models import FilesStatus, ModelEntry, ModelState
from gpu_worker.residency.statuses import status_of

ABSENT, RESIDENT = ModelState.ABSENT, ModelState.RESIDENT
NO_FILES = FilesStatus(problem="no weights")
NOW = 100.0


def an_entry(**fields: Any) -> ModelEntry:
    """A model that is resident, unless `fields` say something else."""
    return ModelEntry(**{"id": "m", "estimated_bytes": 100, "state": RESIDENT, **fields})


@pytest.mark.parametrize(
    ("entry", "state"),
    [
        (an_entry(), "resident"),
        (an_entry(state=ModelState.DROPPING), "absent"),
        (an_entry(state=ModelState.OFFLOADING, broken=True), "offloaded"),
        (an_entry(broken=True), "absent"),
        (an_entry(broken=True, references=1), "loading"),
        (an_entry(state=ABSENT), "absent"),
        (an_entry(state=ABSENT, references=1), "absent"),
        (an_entry(state=ABSENT, files=NO_FILES), "unavailable"),
        (an_entry(state=ABSENT, references=1, files=FilesStatus(downloading=True)), "loading"),
        (an_entry(state=ABSENT, files=FilesStatus(downloading=True)), "absent"),
    ],
)
def test_state(entry: ModelEntry, state: str) -> None:
    """A model that leaves counts as gone; one that is loaded again, or downloaded for a request, counts as loading."""
    assert status_of(entry, NOW).state == state


def test_idle_time() -> None:
    """It begins with the last use, and there is none before the first use or during a request."""
    assert status_of(an_entry(last_used=40.0, used_at=1e9), NOW).idle_s == 60.0
    assert status_of(an_entry(last_used=40.0, used_at=1e9, references=1), NOW).idle_s is None
    assert status_of(an_entry(last_used=40.0), NOW).idle_s is None


def test_detail() -> None:
    """The progress of a move comes first, then missing files of an absent model, then the last error."""
    failed = an_entry(last_error="no room", files=NO_FILES)
    assert status_of(failed, NOW).detail == "no room"
    assert status_of(an_entry(state=ABSENT, last_error="no room", files=NO_FILES), NOW).detail == "no weights"
    assert status_of(an_entry(progress="50 %", last_error="no room"), NOW).detail == "50 %"
