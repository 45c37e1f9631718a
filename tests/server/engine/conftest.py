"""The GPU worker of the tests of engine clients."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import FakeWorker


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[FakeWorker]:
    """A GPU worker that speaks canned tones."""
    with FakeWorker(tmp_path / "w.ipc") as fake:
        yield fake
